// A recorded model: a list of instructions over planned buffers.
//
// Two sizes stay open until a step: the tokens of the batch, and the rows whose logits are wanted. All instructions run
// in one parallel region, stage by stage: threads claim a stage's items from a shared counter, and meet at a barrier. A
// stage is either row-wise instructions, whose items are rows that each instruction is run on in turn, or others that
// need nothing of each other, whose items follow each other.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "batch.h"
#include "experts.h"
#include "kernels.h"
#include "memory.h"
#include "state_cache.h"
#include "threads.h"

namespace jinn {

enum class Rows { Tokens, Logits };

// Of each linear that adapters change, the matrix of each adapter.
using AdapterWeights = std::vector<std::vector<std::shared_ptr<PackedTensor>>>;

// Columns first_col .. first_col + cols - 1 of a buffer.
struct Operand {
  int buffer = -1;
  int64_t first_col = 0;
  int64_t cols = 0;
};

// The activations that experts read: a row per token, and a row per place, which gather fills for several tokens.
struct ExpertsInput {
  int tokens, gathered;  // buffers
  ActivationType type;
};

class Step;

class Instruction {
 public:
  virtual ~Instruction() = default;
  virtual int64_t num_items(const Step& step) const = 0;
  virtual void run(const Step& step, int64_t item) const = 0;
  virtual std::string name() const = 0;
  // The weights that an item reads first, known before any stage has run; empty for no item of it, and where there
  // are none or others decide which.
  virtual std::span<const uint8_t> first_weights(const Step&, int64_t) const { return {}; }
  // The buffer whose rows are computed each by itself, 16 to an item; -1 for other instructions.
  virtual int row_buffer() const { return -1; }
};

// Name and seconds of each stage of a run, from the end of the one before.
using StageTimes = std::vector<std::pair<std::string, double>>;

// What a run leaves for its caller.
struct Outputs {
  Matrix logits;  // [num_rows, vocab_size]
  Matrix hidden;  // [num_tokens, hidden_size]; empty unless the program keeps it
};

class Program {
 public:
  Program(std::shared_ptr<ThreadPool> pool, const Kernels& kernels) : pool_(std::move(pool)), kernels_(kernels) {}

  // A buffer of `row_bytes` per row. Buffers of one slot share memory, since they are never alive together.
  int add_buffer(Rows rows, int64_t row_bytes, int slot);

  // What follows may run as soon as all before it has.
  void begin_stage() { stages_.emplace_back(); }

  // Operands first, then what else the op takes.
  void embed(Operand out, std::shared_ptr<PackedTensor> table);
  void quantize(Operand x, ActivationType type, bool round_to_bf16, int out_buffer);
  // Each weight reads the whole input; `residual` may be empty (buffer -1).
  void linear(int input_buffer, ActivationType type, std::vector<std::shared_ptr<PackedTensor>> weights,
              std::vector<std::vector<float>> biases, std::vector<Operand> outputs, Operand residual);
  // silu(gate) * up, as down's input; `weights` are gate and up.
  void gated_linear(int input_buffer, ActivationType type, std::vector<std::shared_ptr<PackedTensor>> weights,
                    std::vector<std::vector<float>> biases, ActivationType out_type, bool round_to_bf16,
                    int out_buffer);
  // What each sequence's adapter makes of its rows: output p is the product of input p and weights[p][adapter], which
  // may be null. A sum adds it to what is there; otherwise rows of others are left as they are.
  void adapter_linear(std::vector<Operand> inputs, std::vector<Operand> outputs, AdapterWeights weights, bool is_sum);
  void rms_norm(Operand x, Operand out, std::vector<float> weight, float eps);
  void silu_mul(Operand gate, Operand up, Operand out);
  // `gate` has as many columns as x, or one.
  void sigmoid_mul(Operand x, Operand gate, Operand out);
  void add(Operand a, Operand b, Operand out);
  void rope_table(std::vector<float> inv_freq, float attention_factor, int out_buffer);
  void rope(int table_buffer, int num_pairs, int num_heads, bool is_interleaved, Operand x, Operand out);
  void store_kv(Operand k, Operand v, int layer);
  void attention(Operand q, Operand out, int layer, int num_kv_heads, float scale);
  // The experts of a mixture (experts.h): chosen per row, then computed at places, rows of one expert side by side.
  void route(Operand logits, const RouteSpec& spec, std::vector<float> bias, Operand scores, Operand weights,
             Operand ids);
  void group_rows(Operand ids, int64_t num_experts, int places_buffer);
  void gather(int places_buffer, int input_buffer, ActivationType type, int64_t cols, int out_buffer);
  void experts_gated_linear(int places_buffer, std::vector<ExpertsInput> inputs,
                            std::vector<std::shared_ptr<PackedExperts>> weights, ActivationType out_type,
                            bool round_to_bf16, int out_buffer);
  void experts_linear(int places_buffer, int input_buffer, ActivationType type, std::shared_ptr<PackedExperts> weight,
                      int out_buffer);
  void combine(Operand weights, int places_buffer, int x_buffer, Operand out);
  void select_rows(Operand x, Operand out);
  // The parts of each head, side by side, and back.
  void split_heads(Operand x, std::vector<Operand> outputs, int64_t num_heads);
  void join_heads(std::vector<Operand> values, Operand out, int64_t num_heads);
  // Each head by a matrix of its own.
  void head_linear(int input_buffer, ActivationType type, std::shared_ptr<PackedExperts> weight, Operand out);
  // Linear attention, whose layers keep states (state_cache.h). `taps` are [conv_kernel][columns].
  void causal_conv1d(Operand x, Operand out, int layer, const StateSpec& spec, std::vector<float> taps);
  void gated_delta_rule(Operand qkv, Operand a, Operand b, Operand out, int layer, const StateSpec& spec,
                        std::vector<float> decay_rates, std::vector<float> dt_bias);
  void given_hidden(Operand out);
  void set_logits(Operand logits) { logits_ = logits; }
  void set_hidden(Operand hidden) { hidden_ = hidden; }

  // Runs the batch; what it computes stays valid until the next run. `states` may be null where no layer keeps any,
  // and `times` where nobody asks.
  Outputs run(const BatchView& batch, const KVCache& cache, StateCache* states, StageTimes* times = nullptr);

  // What each layer with states keeps; empty for most models.
  const std::vector<StateSpec>& state_specs() const { return state_specs_; }
  // Adapters that its linears know, 0 where none do.
  int64_t num_adapters() const { return num_adapters_; }
  // Columns of the batch's hidden states that are read, 0 where none are.
  int64_t hidden_cols() const { return hidden_cols_; }

  ThreadPool& pool() const { return *pool_; }
  const Kernels& kernels() const { return kernels_; }

 private:
  friend class Step;
  class Pass;
  using Stage = std::vector<std::unique_ptr<Instruction>>;
  struct Buffer {
    Rows rows;
    int64_t row_bytes;
    int slot;
  };

  void append(std::unique_ptr<Instruction> instruction);
  void use_states(int layer, const StateSpec& spec);
  void set_progress(const BatchView& batch, StateCache* states) const;
  std::vector<uint8_t*> lay_out(const BatchView& batch);
  Rows rows_of(const Operand& operand) const { return buffers_[static_cast<size_t>(operand.buffer)].rows; }

  std::shared_ptr<ThreadPool> pool_;
  const Kernels& kernels_;
  std::vector<Buffer> buffers_;
  std::vector<Stage> stages_;
  Operand logits_, hidden_;
  std::vector<StateSpec> state_specs_;
  int64_t hidden_cols_ = 0, num_adapters_ = 0;
  Memory arena_{1, true};
};

// What instructions see of a run.
class Step {
 public:
  Step(const Program& program, const BatchView& batch, const KVCache& cache, const StateCache* states,
       std::vector<uint8_t*> memory)
      : batch(batch),
        cache(cache),
        states(states),
        kernels(program.kernels()),
        adapter_runs(batch.adapter_runs()),
        program_(program),
        memory_(std::move(memory)) {}

  const BatchView& batch;
  const KVCache& cache;
  const StateCache* states;  // null where no layer keeps states
  const Kernels& kernels;
  const std::vector<AdapterRun> adapter_runs;

  int num_threads() const { return program_.pool().size(); }
  uint8_t* buffer(int b) const { return memory_[static_cast<size_t>(b)]; }
  int64_t row_bytes(int b) const { return program_.buffers_[static_cast<size_t>(b)].row_bytes; }
  int64_t num_rows(int b) const {
    return program_.buffers_[static_cast<size_t>(b)].rows == Rows::Tokens ? batch.num_tokens : batch.num_rows;
  }
  Matrix matrix(const Operand& o) const {
    return {reinterpret_cast<float*>(buffer(o.buffer)) + o.first_col, row_bytes(o.buffer) / 4, o.cols};
  }

 private:
  const Program& program_;
  std::vector<uint8_t*> memory_;
};

}  // namespace jinn
