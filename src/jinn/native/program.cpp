#include "program.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <new>

#include "instructions.h"

namespace jinn {
namespace {

constexpr int64_t kFloatRows = 256;      // as kLinearRows of inputs in floats, which need more rows per weight
constexpr int64_t kAttentionRows = 128;  // query rows, tokens by heads, that one claim covers where there are many
constexpr int64_t kAttentionHeads = 16;  // query heads of one key/value head that one claim covers

class Embed : public RowWise {
 public:
  Embed(std::shared_ptr<PackedTensor> table, Operand out) : RowWise(out.buffer), table_(std::move(table)), out_(out) {}
  std::string name() const override { return "embed"; }
  void rows(const Step& step, int64_t first, int64_t last) const override {
    const Matrix out = step.matrix(out_);
    for (int64_t r = first; r < last; ++r) table_->dequantize_row(step.batch.token_ids[r], out.row(r));
  }

 private:
  std::shared_ptr<PackedTensor> table_;
  Operand out_;
};

class Quantize : public RowWise {
 public:
  Quantize(Operand x, ActivationType type, bool round_to_bf16, int out)
      : RowWise(out), x_(x), type_(type), round_to_bf16_(round_to_bf16) {}
  std::string name() const override { return "quantize"; }
  void rows(const Step& step, int64_t first, int64_t last) const override {
    const Activations out{step.buffer(buffer_), step.row_bytes(buffer_), x_.cols, type_};
    step.kernels.quantize_rows(round_to_bf16_, step.matrix(x_), out, first, last);
  }

 private:
  Operand x_;
  ActivationType type_;
  bool round_to_bf16_;
};

class RmsNorm : public RowWise {
 public:
  RmsNorm(Operand x, std::vector<float> weight, float eps, Operand out)
      : RowWise(out.buffer), x_(x), weight_(std::move(weight)), eps_(eps), out_(out) {}
  std::string name() const override { return "rms_norm"; }
  void rows(const Step& step, int64_t first, int64_t last) const override {
    step.kernels.rms_norm(step.matrix(x_), weight_.data(), static_cast<int64_t>(weight_.size()), eps_,
                          step.matrix(out_), first, last);
  }

 private:
  Operand x_;
  std::vector<float> weight_;
  float eps_;
  Operand out_;
};

class SiluMul : public RowWise {
 public:
  SiluMul(Operand gate, Operand up, Operand out) : RowWise(out.buffer), gate_(gate), up_(up), out_(out) {}
  std::string name() const override { return "silu_mul"; }
  void rows(const Step& step, int64_t first, int64_t last) const override {
    step.kernels.silu_mul(step.matrix(gate_), step.matrix(up_), step.matrix(out_), first, last);
  }

 private:
  Operand gate_, up_, out_;
};

class SigmoidMul : public RowWise {
 public:
  SigmoidMul(Operand x, Operand gate, Operand out) : RowWise(out.buffer), x_(x), gate_(gate), out_(out) {}
  std::string name() const override { return "sigmoid_mul"; }
  void rows(const Step& step, int64_t first, int64_t last) const override {
    step.kernels.sigmoid_mul(step.matrix(x_), step.matrix(gate_), step.matrix(out_), first, last);
  }

 private:
  Operand x_, gate_, out_;
};

class Add : public RowWise {
 public:
  Add(Operand a, Operand b, Operand out) : RowWise(out.buffer), a_(a), b_(b), out_(out) {}
  std::string name() const override { return "add"; }
  void rows(const Step& step, int64_t first, int64_t last) const override {
    step.kernels.add(step.matrix(a_), step.matrix(b_), step.matrix(out_), first, last);
  }

 private:
  Operand a_, b_, out_;
};

// cos and sin of position * inv_freq, the angle in float32 as the definition has it.
class RopeTable : public RowWise {
 public:
  RopeTable(std::vector<float> inv_freq, float attention_factor, int out)
      : RowWise(out), inv_freq_(std::move(inv_freq)), attention_factor_(attention_factor) {}
  std::string name() const override { return "rope_table"; }
  void rows(const Step& step, int64_t first, int64_t last) const override {
    const size_t n = inv_freq_.size();
    for (int64_t r = first; r < last; ++r) {
      float* row = reinterpret_cast<float*>(step.buffer(buffer_)) + static_cast<size_t>(r) * 2 * n;
      for (size_t i = 0; i < n; ++i) {
        const double angle = static_cast<float>(step.batch.positions[r]) * inv_freq_[i];
        row[i] = static_cast<float>(std::cos(angle)) * attention_factor_;
        row[n + i] = static_cast<float>(std::sin(angle)) * attention_factor_;
      }
    }
  }

 private:
  std::vector<float> inv_freq_;
  float attention_factor_;
};

class Rope : public RowWise {
 public:
  Rope(int table, int num_pairs, int num_heads, bool is_interleaved, Operand x, Operand out)
      : RowWise(out.buffer),
        table_(table),
        rotation_{nullptr, num_pairs, num_heads, is_interleaved},
        x_(x),
        out_(out) {}
  std::string name() const override { return "rope"; }
  void rows(const Step& step, int64_t first, int64_t last) const override {
    Rotation rotation = rotation_;
    rotation.table = reinterpret_cast<const float*>(step.buffer(table_));
    step.kernels.rope(rotation, step.matrix(x_), step.matrix(out_), first, last);
  }

 private:
  int table_;
  Rotation rotation_;
  Operand x_, out_;
};

class SelectRows : public RowWise {
 public:
  SelectRows(Operand x, Operand out) : RowWise(out.buffer), x_(x), out_(out) {}
  std::string name() const override { return "select_rows"; }
  void rows(const Step& step, int64_t first, int64_t last) const override {
    const Matrix x = step.matrix(x_), out = step.matrix(out_);
    for (int64_t r = first; r < last; ++r) {
      std::memcpy(out.row(r), x.row(step.batch.logit_rows[r]), sizeof(float) * static_cast<size_t>(x.cols));
    }
  }

 private:
  Operand x_, out_;
};

class GivenHidden : public RowWise {
 public:
  explicit GivenHidden(Operand out) : RowWise(out.buffer), out_(out) {}
  std::string name() const override { return "given_hidden"; }
  void rows(const Step& step, int64_t first, int64_t last) const override {
    const Matrix out = step.matrix(out_);
    for (int64_t r = first; r < last; ++r) {
      std::memcpy(out.row(r), step.batch.hidden.row(r), sizeof(float) * static_cast<size_t>(out.cols));
    }
  }

 private:
  Operand out_;
};

// Items are blocks of (tiles, rows); the tiles of all weights count as one sequence.
class Linear : public Instruction {
 public:
  Linear(int input, ActivationType type, std::vector<std::shared_ptr<PackedTensor>> weights,
         std::vector<std::vector<float>> biases, std::vector<Operand> outputs, Operand residual)
      : input_(input),
        type_(type),
        weights_(std::move(weights)),
        biases_(std::move(biases)),
        outputs_(std::move(outputs)),
        residual_(residual) {
    for (const auto& weight : weights_) num_tiles_ += weight->num_tiles();
  }
  std::string name() const override { return "linear " + std::to_string(num_tiles_ * kTileRows); }

  int64_t num_items(const Step& step) const override { return tile_blocks(step) * row_blocks(step); }

  std::span<const uint8_t> first_weights(const Step& step, int64_t item) const override {
    if (item >= num_items(step)) return {};
    auto [first, last] = tiles_of(step, item);
    size_t w = 0;
    for (; first >= weights_[w]->num_tiles(); ++w) {
      first -= weights_[w]->num_tiles();
      last -= weights_[w]->num_tiles();
    }
    return weights_[w]->tiles(first, std::min(last, weights_[w]->num_tiles()));
  }

  void run(const Step& step, int64_t item) const override {
    const int64_t rows = step.num_rows(input_), first_row = item % row_blocks(step) * claim_rows();
    auto [first, last] = tiles_of(step, item);
    for (size_t w = 0; w < weights_.size() && first < last; ++w) {
      const int64_t tiles = weights_[w]->num_tiles();
      if (first < tiles) {
        multiply(step, w, first, std::min(last, tiles), first_row, std::min(rows, first_row + claim_rows()));
        first = tiles;
      }
      first -= tiles;
      last -= tiles;
    }
  }

 private:
  int64_t claim_rows() const { return is_integer(type_) ? kLinearRows : kFloatRows; }
  int64_t row_blocks(const Step& step) const { return ceil_div(step.num_rows(input_), claim_rows()); }
  int64_t tile_blocks(const Step& step) const {
    return weight_blocks(step.num_threads(), row_blocks(step), num_tiles_);
  }

  std::pair<int64_t, int64_t> tiles_of(const Step& step, int64_t item) const {
    return item_range(item / row_blocks(step), tile_blocks(step), num_tiles_);
  }

  void multiply(const Step& step, size_t w, int64_t first, int64_t last, int64_t first_row, int64_t last_row) const {
    Matrix residual;
    if (residual_.buffer >= 0) residual = step.matrix(residual_);
    LinearPiece piece{weights_[w].get(),
                      biases_[w].empty() ? nullptr : biases_[w].data(),
                      {step.buffer(input_), step.row_bytes(input_), weights_[w]->cols(), type_},
                      step.matrix(outputs_[w]),
                      residual_.buffer >= 0 ? &residual : nullptr,
                      first,
                      last,
                      first_row,
                      last_row};
    step.kernels.linear(piece);
  }

  int input_;
  ActivationType type_;
  std::vector<std::shared_ptr<PackedTensor>> weights_;
  std::vector<std::vector<float>> biases_;
  std::vector<Operand> outputs_;
  Operand residual_;
  int64_t num_tiles_ = 0;
};

class StoreKV : public RowWise {
 public:
  StoreKV(int layer, Operand k, Operand v) : RowWise(k.buffer), layer_(layer), k_(k), v_(v) {}
  std::string name() const override { return "store_kv"; }
  void rows(const Step& step, int64_t first, int64_t last) const override {
    for (int64_t s = 0; s < step.batch.num_seqs; ++s) {
      const SequenceView sequence = step.batch.sequence(s);
      const int64_t from = std::max(first, sequence.first_token);
      const int64_t to = std::min(last, sequence.first_token + sequence.num_tokens);
      if (from < to) step.kernels.store_kv(step.cache, layer_, sequence, step.matrix(k_), step.matrix(v_), from, to);
    }
  }

 private:
  int layer_;
  Operand k_, v_;
};

// Items are (sequence, chunk of query tokens, key/value head, block of its query heads); the longest chunks come last
// in a sequence, so they are claimed from its end.
class Attention : public Instruction {
 public:
  Attention(int layer, int num_kv_heads, float scale, Operand q, Operand out)
      : layer_(layer), num_kv_heads_(num_kv_heads), scale_(scale), q_(q), out_(out) {}
  std::string name() const override { return "attention"; }

  int64_t num_items(const Step& step) const override { return num_items(step, chunk_tokens(step)); }

  void run(const Step& step, int64_t item) const override {
    const int64_t head_blocks = num_head_blocks(step), kv_head = item / head_blocks % num_kv_heads_;
    const int64_t tokens = chunk_tokens(step), chunk = item / head_blocks / num_kv_heads_;
    const int64_t s = sequence_of(step, chunk, tokens);
    const SequenceView sequence = step.batch.sequence(s);
    const int64_t from_end = ceil_div(sequence.num_tokens, tokens) - 1 - (chunk - first_chunk(step, s, tokens));
    if (from_end < 0) return;
    const int64_t first_token = sequence.first_token + from_end * tokens;
    const int64_t first_head = kv_head * group_size(step) + item % head_blocks * kAttentionHeads;
    step.kernels.attention({&step.cache, layer_, sequence, static_cast<int>(kv_head), first_head,
                            std::min((kv_head + 1) * group_size(step), first_head + kAttentionHeads), first_token,
                            std::min(sequence.first_token + sequence.num_tokens, first_token + tokens), scale_,
                            step.matrix(q_), step.matrix(out_)});
  }

 private:
  // Query tokens of one claim: as many as still leave claims for all threads, since they share what they read.
  int64_t chunk_tokens(const Step& step) const {
    const int64_t heads = std::min(group_size(step), kAttentionHeads), wanted = kClaimsPerThread * step.num_threads();
    int64_t rows = kAttentionRows;
    while (rows > 32 && num_items(step, std::max<int64_t>(1, rows / heads)) < wanted) rows /= 2;
    return std::max<int64_t>(1, rows / heads);
  }

  // Sequences' chunks are numbered from where they begin at the earliest, whatever the lengths of those before them: no
  // claim counts through all sequences, though some numbers have no chunk.
  static int64_t first_chunk(const Step& step, int64_t s, int64_t tokens) {
    return step.batch.query_start[s] / tokens + s;
  }
  int64_t num_items(const Step& step, int64_t tokens) const {
    return first_chunk(step, step.batch.num_seqs, tokens) * num_kv_heads_ * num_head_blocks(step);
  }
  static int64_t sequence_of(const Step& step, int64_t chunk, int64_t tokens) {
    int64_t s = 0;
    for (int64_t end = step.batch.num_seqs; end - s > 1;) {
      const int64_t middle = (s + end) / 2;
      (first_chunk(step, middle, tokens) <= chunk ? s : end) = middle;
    }
    return s;
  }

  // Query heads of one key/value head.
  int64_t group_size(const Step& step) const { return q_.cols / step.cache.layer(layer_).key_dim / num_kv_heads_; }
  int64_t num_head_blocks(const Step& step) const { return ceil_div(group_size(step), kAttentionHeads); }

  int layer_, num_kv_heads_;
  float scale_;
  Operand q_, out_;
};

}  // namespace

int Program::add_buffer(Rows rows, int64_t row_bytes, int slot) {
  buffers_.push_back({rows, (row_bytes + 63) / 64 * 64, slot});
  return static_cast<int>(buffers_.size()) - 1;
}

void Program::append(std::unique_ptr<Instruction> instruction) {
  expect(!stages_.empty(), "[program] expected begin_stage first");
  auto& stage = stages_.back();
  const int rows = instruction->row_buffer();
  if (!stage.empty()) {
    const int first = stage.front()->row_buffer();
    expect((rows < 0) == (first < 0) &&
               (rows < 0 || buffers_[static_cast<size_t>(rows)].rows == buffers_[static_cast<size_t>(first)].rows),
           "[program] expected a stage's instructions all row-wise on one kind of rows, or none");
  }
  stage.push_back(std::move(instruction));
}

void Program::embed(Operand out, std::shared_ptr<PackedTensor> table) {
  expect(table->cols() == out.cols, "[embed] expected hidden_size columns");
  append(std::make_unique<Embed>(std::move(table), out));
}

void Program::quantize(Operand x, ActivationType type, bool round_to_bf16, int out_buffer) {
  expect(!is_integer(type) || x.cols % kGroup == 0, "[quantize] expected columns in groups of 32");
  append(std::make_unique<Quantize>(x, type, round_to_bf16, out_buffer));
}

void Program::linear(int input_buffer, ActivationType type, std::vector<std::shared_ptr<PackedTensor>> weights,
                     std::vector<std::vector<float>> biases, std::vector<Operand> outputs, Operand residual) {
  expect(weights.size() == outputs.size() && weights.size() == biases.size() && !weights.empty(),
         "[linear] expected one output and one bias per weight");
  expect(activation_stride(type, weights[0]->cols()) <= buffers_[static_cast<size_t>(input_buffer)].row_bytes,
         "[linear] expected an input as wide as the weights");
  for (size_t w = 0; w < weights.size(); ++w) {
    expect(weights[w]->rows() == outputs[w].cols, "[linear] expected as many output columns as weight rows");
    expect(weights[w]->cols() == weights[0]->cols(), "[linear] expected weights of one input width");
    expect(biases[w].empty() || static_cast<int64_t>(biases[w].size()) == weights[w]->rows(),
           "[linear] expected a bias per weight row");
  }
  append(std::make_unique<Linear>(input_buffer, type, std::move(weights), std::move(biases), std::move(outputs),
                                  residual));
}

void Program::rms_norm(Operand x, Operand out, std::vector<float> weight, float eps) {
  expect(!weight.empty() && x.cols % static_cast<int64_t>(weight.size()) == 0 && x.cols == out.cols,
         "[rms_norm] expected columns in whole runs of the weight");
  append(std::make_unique<RmsNorm>(x, std::move(weight), eps, out));
}

void Program::silu_mul(Operand gate, Operand up, Operand out) {
  expect(gate.cols == up.cols && gate.cols == out.cols, "[silu_mul] expected equal widths");
  append(std::make_unique<SiluMul>(gate, up, out));
}

void Program::sigmoid_mul(Operand x, Operand gate, Operand out) {
  expect(x.cols == out.cols && (gate.cols == x.cols || gate.cols == 1), "[sigmoid_mul] expected equal widths");
  append(std::make_unique<SigmoidMul>(x, gate, out));
}

void Program::add(Operand a, Operand b, Operand out) {
  expect(a.cols == b.cols && a.cols == out.cols, "[add] expected equal widths");
  append(std::make_unique<Add>(a, b, out));
}

void Program::rope_table(std::vector<float> inv_freq, float attention_factor, int out_buffer) {
  append(std::make_unique<RopeTable>(std::move(inv_freq), attention_factor, out_buffer));
}

void Program::rope(int table_buffer, int num_pairs, int num_heads, bool is_interleaved, Operand x, Operand out) {
  expect(x.cols == out.cols && x.cols % num_heads == 0 && x.cols / num_heads >= 2 * num_pairs,
         "[rope] expected heads of at least " + std::to_string(2 * num_pairs) + " columns");
  append(std::make_unique<Rope>(table_buffer, num_pairs, num_heads, is_interleaved, x, out));
}

void Program::store_kv(Operand k, Operand v, int layer) { append(std::make_unique<StoreKV>(layer, k, v)); }

void Program::attention(Operand q, Operand out, int layer, int num_kv_heads, float scale) {
  append(std::make_unique<Attention>(layer, num_kv_heads, scale, q, out));
}

void Program::select_rows(Operand x, Operand out) {
  expect(x.cols == out.cols, "[select_rows] expected equal widths");
  append(std::make_unique<SelectRows>(x, out));
}

void Program::given_hidden(Operand out) {
  expect(hidden_cols_ == 0 || hidden_cols_ == out.cols, "[given_hidden] expected one width");
  hidden_cols_ = out.cols;
  append(std::make_unique<GivenHidden>(out));
}

// Memory for each buffer: slots one after another, each as large as its largest buffer.
std::vector<uint8_t*> Program::lay_out(const BatchView& batch) {
  std::vector<size_t> slot_bytes;
  for (const Buffer& buffer : buffers_) {
    const int64_t rows = buffer.rows == Rows::Tokens ? batch.num_tokens : batch.num_rows;
    const size_t slot = static_cast<size_t>(buffer.slot);
    if (slot >= slot_bytes.size()) slot_bytes.resize(slot + 1);
    const int64_t whole_blocks = ceil_div(rows, kActivationRows) * kActivationRows;
    slot_bytes[slot] = std::max(slot_bytes[slot], static_cast<size_t>(buffer.row_bytes * whole_blocks));
  }
  std::vector<size_t> slot_offset;
  size_t total = 0;
  for (const size_t bytes : slot_bytes) {
    slot_offset.push_back(total);
    total += bytes;
  }
  if (total > arena_.size()) arena_ = Memory(total, true);
  std::vector<uint8_t*> memory;
  for (const Buffer& buffer : buffers_) memory.push_back(arena_.data() + slot_offset[static_cast<size_t>(buffer.slot)]);
  return memory;
}

void Program::set_progress(const BatchView& batch, StateCache* states) const {
  if (state_specs_.empty()) return;
  for (int64_t s = 0; s < batch.num_seqs; ++s) {
    const int64_t drafts = batch.num_drafts[s];
    states->set_progress(batch.state_slots[s], {batch.context_lens[s] - drafts, drafts});
  }
}

// One pass through a program's stages, by all threads of its pool.
//
// A stage of one item is computed by the thread that finds it first: the last to finish the stage before, while the
// others wait. So few rows, whose small ops have one item each, take a barrier per large op only.
class Program::Pass {
 public:
  // `times` may be null.
  Pass(const Program& program, const Step& step, StageTimes* times) : program_(program), step_(step), times_(times) {}

  void run() {
    started_ = Clock::now();
    go_to(0);
    if (stage_ < program_.stages_.size()) program_.pool_->run([this](int thread) { work(thread); });
  }

 private:
  using Clock = std::chrono::steady_clock;

  void work(int thread) {
    while (stage_ < program_.stages_.size()) {
      for (int64_t item = thread; item < num_items_; item = next_item_++) run_item(item);
      program_.pool_->barrier(
          [this] {
            take_time();
            go_to(stage_ + 1);
          },
          FirstFetch(*this, stage_ + 1, thread));
    }
  }

  // Asks for the weights that a thread will read first after a barrier, a few lines per call, until all of them are on
  // their way: memory has nothing to do meanwhile, and claims would begin cold.
  class FirstFetch {
   public:
    FirstFetch(const Pass& pass, size_t stage, int64_t item)
        : pass_(pass), stage_(stage), end_(std::min(stage + kStagesAhead, pass.program_.stages_.size())), item_(item) {}

    bool operator()() {
      for (; bytes_.empty() && stage_ < end_; ++stage_) {
        bytes_ = pass_.program_.stages_[stage_].front()->first_weights(pass_.step_, item_);
        bytes_ = bytes_.first(std::min(bytes_.size(), kFetchedBytes));
      }
      for (int line = 0; line < kLinesPerCall && !bytes_.empty(); ++line) {
        __builtin_prefetch(bytes_.data(), 0, 2);
        bytes_ = bytes_.subspan(std::min<size_t>(bytes_.size(), 64));
      }
      return !bytes_.empty();
    }

   private:
    static constexpr size_t kStagesAhead = 4;           // past attention and what stands around it
    static constexpr size_t kFetchedBytes = 256 << 10;  // which second-level caches hold
    static constexpr int kLinesPerCall = 8;             // as many as are no wait to speak of

    const Pass& pass_;
    size_t stage_, end_;  // where to look for weights
    int64_t item_;
    std::span<const uint8_t> bytes_;  // left to ask for
  };

  // Sets the stage that all threads compute next, and computes those before it. One thread at a time.
  void go_to(size_t stage) {
    for (stage_ = stage; stage_ < program_.stages_.size(); ++stage_) {
      num_items_ = count_items(program_.stages_[stage_]);
      if (num_items_ > 1) break;
      if (num_items_ == 1) run_item(0);
      take_time();
    }
    next_item_.store(program_.pool_->size(), std::memory_order_relaxed);
  }

  int64_t count_items(const Stage& stage) const {
    if (is_chain(stage)) return stage.front()->num_items(step_);
    int64_t items = 0;
    for (const auto& instruction : stage) items += instruction->num_items(step_);
    return items;
  }

  void run_item(int64_t item) const {
    const Stage& stage = program_.stages_[stage_];
    if (is_chain(stage)) {
      for (const auto& instruction : stage) instruction->run(step_, item);
      return;
    }
    for (const auto& instruction : stage) {
      const int64_t items = instruction->num_items(step_);
      if (item < items) return instruction->run(step_, item);
      item -= items;
    }
  }

  static bool is_chain(const Stage& stage) { return stage.front()->row_buffer() >= 0; }

  void take_time() {
    if (!times_) return;
    std::string name;
    const Stage& stage = program_.stages_[stage_];
    for (const auto& instruction : stage) {
      name += (name.empty() ? "" : is_chain(stage) ? " + " : " | ") + instruction->name();
    }
    const Clock::time_point now = Clock::now();
    times_->emplace_back(name, std::chrono::duration<double>(now - started_).count());
    started_ = now;
  }

  const Program& program_;
  const Step& step_;
  StageTimes* times_;
  Clock::time_point started_;
  size_t stage_ = 0;
  int64_t num_items_ = 0;
  alignas(64) std::atomic<int64_t> next_item_{0};  // thread t begins with item t
};

Outputs Program::run(const BatchView& batch, const KVCache& cache, StateCache* states, StageTimes* times) {
  const Step step(*this, batch, cache, states, lay_out(batch));
  Pass(*this, step, times).run();
  set_progress(batch, states);
  return {step.matrix(logits_), hidden_.buffer < 0 ? Matrix{} : step.matrix(hidden_)};
}

}  // namespace jinn
