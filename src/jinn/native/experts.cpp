#include "experts.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "instructions.h"

namespace jinn {
namespace {

constexpr int64_t kRowsAtOnce = 64;  // rows that one tile range is multiplied with before the next rows

// A buffer with a row per place.
struct PlaceRows {
  uint8_t* data;
  int64_t stride;  // bytes

  PlaceRows(const Step& step, int buffer, const Places& places)
      : data(step.buffer(buffer)), stride(step.row_bytes(buffer) / (kPlacesPerChoice * places.num_choices())) {}

  Activations activations(ActivationType type, int64_t cols) const { return {data, stride, cols, type}; }
  Matrix matrix(int64_t first_col, int64_t cols) const {
    return {reinterpret_cast<float*>(data) + first_col, stride / 4, cols};
  }
};

Places places_of(const Step& step, int buffer) { return {step.buffer(buffer), step.num_rows(buffer)}; }

class Route : public RowWise {
 public:
  Route(Operand logits, const RouteSpec& spec, std::vector<float> bias, Operand scores, Operand weights, Operand ids)
      : RowWise(ids.buffer),
        logits_(logits),
        spec_(spec),
        bias_(std::move(bias)),
        scores_(scores),
        weights_(weights),
        ids_(ids) {
    if (!bias_.empty()) spec_.bias = bias_.data();
  }
  std::string name() const override { return "route"; }
  void rows(const Step& step, int64_t first, int64_t last) const override {
    const RouteOutput out{step.matrix(scores_), step.matrix(weights_), step.matrix(ids_)};
    step.kernels.route(spec_, step.matrix(logits_), out, first, last);
  }

 private:
  Operand logits_;
  RouteSpec spec_;
  std::vector<float> bias_;
  Operand scores_, weights_, ids_;
};

// One item: counting the choices of each expert is little work.
class GroupRows : public Instruction {
 public:
  GroupRows(Operand ids, int64_t num_experts, int places) : ids_(ids), num_experts_(num_experts), places_(places) {}
  std::string name() const override { return "group_rows"; }
  int64_t num_items(const Step&) const override { return 1; }
  void run(const Step& step, int64_t) const override {
    places_of(step, places_).assign(step.matrix(ids_), num_experts_);
  }

 private:
  Operand ids_;
  int64_t num_experts_;
  int places_;
};

// Instructions on blocks of kActivationRows places, each place by itself.
class PlaceWise : public Instruction {
 public:
  explicit PlaceWise(int places) : places_(places) {}
  int64_t num_items(const Step& step) const override {
    return ceil_div(places_of(step, places_).num_places(), kActivationRows);
  }
  void run(const Step& step, int64_t item) const override {
    const Places places = places_of(step, places_);
    const int64_t last = std::min(places.num_places(), (item + 1) * kActivationRows);
    for (int64_t place = item * kActivationRows; place < last; ++place) {
      if (places.token_at()[place] >= 0) at(step, places, place);
    }
  }
  virtual void at(const Step& step, const Places& places, int64_t place) const = 0;

 protected:
  int places_;
};

void copy_row(const Activations& from, int64_t row, const Activations& to, int64_t to_row) {
  if (from.type == ActivationType::F32 || from.type == ActivationType::BF16) {
    std::memcpy(to.row(to_row), from.row(row), static_cast<size_t>(activation_stride(from.type, from.cols)));
    return;
  }
  std::memcpy(to.codes(to_row), from.codes(row), static_cast<size_t>(from.code_bytes()));
  for (int64_t at = 0; at < from.cols / kGroup * kActivationRows; at += kActivationRows) {
    to.scales(to_row)[at] = from.scales(row)[at];
    to.sums(to_row)[at] = from.sums(row)[at];
    to.scaled_sums(to_row)[at] = from.scaled_sums(row)[at];
    to.half_sums(to_row)[at] = from.half_sums(row)[at];
  }
}

// Copies each token's activations to its places.
class Gather : public RowWise {
 public:
  Gather(int places, int input, ActivationType type, int64_t cols, int out)
      : RowWise(input), places_(places), type_(type), cols_(cols), out_(out) {}
  std::string name() const override { return "gather"; }
  void rows(const Step& step, int64_t first, int64_t last) const override {
    const Places places = places_of(step, places_);
    const Activations from{step.buffer(buffer_), step.row_bytes(buffer_), cols_, type_};
    const Activations to = PlaceRows(step, out_, places).activations(type_, cols_);
    for (int64_t choice = first * places.num_choices(); choice < last * places.num_choices(); ++choice) {
      copy_row(from, choice / places.num_choices(), to, places.place_of()[choice]);
    }
  }

 private:
  int places_;
  ActivationType type_;
  int64_t cols_;
  int out_;
};

// silu(gate) * up of each place, as down's input; gate and up lie side by side, each padded to whole tiles.
class ExpertsSiluMul : public PlaceWise {
 public:
  ExpertsSiluMul(int places, int hidden, ActivationType type, bool round_to_bf16, int64_t cols, int out)
      : PlaceWise(places), hidden_(hidden), type_(type), round_to_bf16_(round_to_bf16), cols_(cols), out_(out) {}
  std::string name() const override { return "experts_silu_mul"; }
  void at(const Step& step, const Places& places, int64_t place) const override {
    const PlaceRows hidden(step, hidden_, places);
    const Matrix gate = hidden.matrix(0, cols_);
    const Matrix up = hidden.matrix(ceil_div(cols_, kTileRows) * kTileRows, cols_);
    step.kernels.silu_mul(gate, up, gate, place, place + 1);
    const Activations out = PlaceRows(step, out_, places).activations(type_, cols_);
    step.kernels.quantize_rows(round_to_bf16_, gate, out, place, place + 1);
  }

 private:
  int hidden_;
  ActivationType type_;
  bool round_to_bf16_;
  int64_t cols_;
  int out_;
};

// Items are (group, range of tiles); the tiles of all weights count as one sequence. A group has items by its share of
// the rows, so that many rows of one expert do not fall to one thread.
class ExpertsLinear : public Instruction {
 public:
  ExpertsLinear(int places, int input, ActivationType type, std::vector<std::shared_ptr<PackedExperts>> weights,
                int out, std::vector<int64_t> first_cols)
      : places_(places),
        input_(input),
        type_(type),
        weights_(std::move(weights)),
        out_(out),
        first_cols_(std::move(first_cols)) {
    for (const auto& weight : weights_) num_tiles_ += weight->num_tiles();
  }
  std::string name() const override { return "experts_linear " + std::to_string(num_tiles_ * kTileRows); }

  int64_t num_items(const Step& step) const override {
    const Places places = places_of(step, places_);
    int64_t items = 0;
    for (int64_t g = 0; g < places.num_groups(); ++g) items += num_ranges(step, places, g);
    return items;
  }

  void run(const Step& step, int64_t item) const override {
    const Places places = places_of(step, places_);
    int64_t g = 0;
    for (; item >= num_ranges(step, places, g); ++g) item -= num_ranges(step, places, g);
    const int64_t ranges = num_ranges(step, places, g);
    int64_t first = num_tiles_ * item / ranges, last = num_tiles_ * (item + 1) / ranges;
    for (size_t w = 0; w < weights_.size() && first < last; ++w) {
      const int64_t tiles = weights_[w]->num_tiles();
      if (first < tiles) {
        tiles_of(step, places, g, w, first, std::min(last, tiles));
        first = tiles;
      }
      first -= tiles;
      last -= tiles;
    }
  }

 private:
  int64_t num_ranges(const Step& step, const Places& places, int64_t g) const {
    const int64_t claims = kClaimsPerThread * step.num_threads();
    const int64_t all_rows = places.num_choices() * step.num_rows(places_);
    return std::clamp<int64_t>(ceil_div(claims * places.group(g).num_rows, all_rows), 1, num_tiles_);
  }

  void tiles_of(const Step& step, const Places& places, int64_t g, size_t w, int64_t first, int64_t last) const {
    const PackedExperts& weight = *weights_[w];
    const ExpertGroup& group = places.group(g);
    const int64_t first_tile = weight.first_tile(group.expert), end = group.first_place + group.num_rows;
    for (int64_t row = group.first_place; row < end; row += kRowsAtOnce) {
      step.kernels.linear({&weight.tensor(), nullptr, PlaceRows(step, input_, places).activations(type_, weight.cols()),
                           PlaceRows(step, out_, places).matrix(first_cols_[w], weight.rows()), nullptr,
                           first_tile + first, first_tile + last, row, std::min(end, row + kRowsAtOnce),
                           first_tile * kTileRows});
    }
  }

  int places_, input_;
  ActivationType type_;
  std::vector<std::shared_ptr<PackedExperts>> weights_;
  int out_;
  std::vector<int64_t> first_cols_;
  int64_t num_tiles_ = 0;
};

class Combine : public RowWise {
 public:
  Combine(Operand weights, int places, int x, Operand out)
      : RowWise(out.buffer), weights_(weights), places_(places), x_(x), out_(out) {}
  std::string name() const override { return "combine"; }
  void rows(const Step& step, int64_t first, int64_t last) const override {
    const Places places = places_of(step, places_);
    const Matrix x = PlaceRows(step, x_, places).matrix(0, out_.cols);
    step.kernels.combine(x, places.place_of(), step.matrix(weights_), step.matrix(out_), first, last);
  }

 private:
  Operand weights_;
  int places_, x_;
  Operand out_;
};

}  // namespace

PackedExperts::PackedExperts(Format format, int64_t num_experts, int64_t rows, int64_t cols, const FileRange* file)
    : num_experts_(num_experts), rows_(rows), tensor_(format, num_experts * num_tiles() * kTileRows, cols, file) {}

std::vector<int32_t> PackedExperts::source_rows(const int32_t* row_order) const {
  const int64_t padded = num_tiles() * kTileRows;
  std::vector<int32_t> order(static_cast<size_t>(num_experts_ * padded));
  for (int64_t i = 0; i < num_experts_ * padded; ++i) {
    const int64_t row = std::min(i % padded, rows_ - 1);
    order[static_cast<size_t>(i)] = row_order ? row_order[row] : static_cast<int32_t>(row);
  }
  return order;
}

void PackedExperts::pack(int64_t expert, const uint8_t* source, const std::vector<int32_t>& source_rows, int64_t first,
                         int64_t last) {
  tensor_.pack(source, source_rows.data(), first_tile(expert) + first, first_tile(expert) + last);
}

void PackedExperts::dequantize_row(int64_t expert, int64_t row, float* out) const {
  tensor_.dequantize_row(first_tile(expert) * kTileRows + row, out);
}

void Places::assign(Matrix ids, int64_t num_experts) {
  const auto ids_of = [&](int64_t token) { return reinterpret_cast<const int32_t*>(ids.row(token)); };
  header()->num_choices = static_cast<int32_t>(ids.cols);
  std::vector<int32_t> next(static_cast<size_t>(num_experts));  // of each expert: its rows, then its next free place
  for (int64_t token = 0; token < num_tokens_; ++token) {
    for (int64_t rank = 0; rank < ids.cols; ++rank) ++next[static_cast<size_t>(ids_of(token)[rank])];
  }
  int32_t place = 0, num_groups = 0;
  for (int32_t expert = 0; expert < num_experts; ++expert) {
    int32_t& rows = next[static_cast<size_t>(expert)];
    if (rows == 0) continue;
    const int32_t in_block = place % kActivationRows;
    if (in_block + rows > kActivationRows) place += (kActivationRows - in_block) % kActivationRows;
    groups()[num_groups++] = {expert, place, rows};
    place += std::exchange(rows, place);
  }
  header()->num_groups = num_groups;
  header()->num_places = place;
  std::fill_n(token_at(), place, -1);
  for (int64_t token = 0; token < num_tokens_; ++token) {
    for (int64_t rank = 0; rank < ids.cols; ++rank) {
      const int32_t chosen = next[static_cast<size_t>(ids_of(token)[rank])]++;
      place_of()[token * ids.cols + rank] = chosen;
      token_at()[chosen] = static_cast<int32_t>(token);
    }
  }
}

void Program::route(Operand logits, const RouteSpec& spec, std::vector<float> bias, Operand scores, Operand weights,
                    Operand ids) {
  const int64_t num_experts = logits.cols;
  expect(spec.num_experts_per_tok > 0 && spec.num_experts_per_tok <= num_experts,
         "[route] expected num_experts_per_tok from 1 to the number of experts");
  expect(weights.cols == spec.num_experts_per_tok && ids.cols == weights.cols && scores.cols == num_experts,
         "[route] expected a weight and an id per chosen expert, and a score per expert");
  expect(bias.empty() || static_cast<int64_t>(bias.size()) == num_experts, "[route] expected a bias per expert");
  expect(spec.num_groups > 0 && num_experts % spec.num_groups == 0 && spec.num_chosen_groups > 0 &&
             spec.num_chosen_groups <= spec.num_groups && (spec.num_groups == 1 || num_experts >= 2 * spec.num_groups),
         "[route] expected whole groups of two experts or more");
  append(std::make_unique<Route>(logits, spec, std::move(bias), scores, weights, ids));
}

void Program::group_rows(Operand ids, int64_t num_experts, int places_buffer) {
  expect(Places::row_bytes(ids.cols) <= buffers_[static_cast<size_t>(places_buffer)].row_bytes,
         "[group_rows] expected room for the places of each choice");
  append(std::make_unique<GroupRows>(ids, num_experts, places_buffer));
}

void Program::gather(int places_buffer, int input_buffer, ActivationType type, int64_t cols, int out_buffer) {
  append(std::make_unique<Gather>(places_buffer, input_buffer, type, cols, out_buffer));
}

void Program::experts_linear(int places_buffer, int input_buffer, ActivationType type,
                             std::vector<std::shared_ptr<PackedExperts>> weights, int out_buffer,
                             std::vector<int64_t> first_cols) {
  expect(!weights.empty() && weights.size() == first_cols.size(),
         "[experts_linear] expected a first column per weight");
  for (const auto& weight : weights) {
    expect(weight->cols() == weights[0]->cols() && weight->num_experts() == weights[0]->num_experts(),
           "[experts_linear] expected weights of one input width and number of experts");
  }
  append(std::make_unique<ExpertsLinear>(places_buffer, input_buffer, type, std::move(weights), out_buffer,
                                         std::move(first_cols)));
}

void Program::experts_silu_mul(int places_buffer, int hidden_buffer, ActivationType type, bool round_to_bf16,
                               int64_t cols, int out_buffer) {
  const bool is_integer = type == ActivationType::Int8 || type == ActivationType::Int12;
  expect(!is_integer || cols % kGroup == 0, "[experts_silu_mul] expected columns in groups of 32");
  append(std::make_unique<ExpertsSiluMul>(places_buffer, hidden_buffer, type, round_to_bf16, cols, out_buffer));
}

void Program::combine(Operand weights, int places_buffer, int x_buffer, Operand out) {
  append(std::make_unique<Combine>(weights, places_buffer, x_buffer, out));
}

}  // namespace jinn
