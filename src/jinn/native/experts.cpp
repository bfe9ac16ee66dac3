#include "experts.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "gated_linear.h"
#include "instructions.h"

namespace jinn {
namespace {

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

void copy_row(const Activations& from, int64_t row, const Activations& to, int64_t to_row) {
  if (!is_integer(from.type)) {
    std::memcpy(to.row(to_row), from.row(row), static_cast<size_t>(activation_stride(from.type, from.cols)));
    return;
  }
  const int64_t group_bytes = from.group_bytes();
  for (int64_t at = 0; at < from.cols / kGroup * kActivationRows; at += kActivationRows) {
    std::memcpy(to.codes(to_row) + at * group_bytes, from.codes(row) + at * group_bytes,
                static_cast<size_t>(group_bytes));
    to.scales(to_row)[at] = from.scales(row)[at];
    to.sums(to_row)[at] = from.sums(row)[at];
    to.scaled_sums(to_row)[at] = from.scaled_sums(row)[at];
    to.half_sums(to_row)[at] = from.half_sums(row)[at];
    for (int i = 0; i < kMaxOutliers && from.type == ActivationType::Mixed; ++i) {
      to.outliers(to_row, i)[at] = from.outliers(row, i)[at];
      to.outlier_cols(to_row, i)[at] = from.outlier_cols(row, i)[at];
    }
  }
}

// Copies each token's activations to its places. A single token's are read where they are.
class Gather : public RowWise {
 public:
  Gather(int places, int input, ActivationType type, int64_t cols, int out)
      : RowWise(input), places_(places), type_(type), cols_(cols), out_(out) {}
  std::string name() const override { return "gather"; }
  void rows(const Step& step, int64_t first, int64_t last) const override {
    if (step.num_rows(buffer_) == 1) return;
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

// Instructions that compute parts of what the experts give, each part for all rows of its expert. Items divide all
// parts of all groups, a part counted once per row.
class ExpertParts : public Instruction {
 public:
  ExpertParts(int places, int64_t parts_per_expert) : places_(places), parts_per_expert_(parts_per_expert) {}

  int64_t num_items(const Step& step) const override {
    const int64_t per_thread = step.num_rows(places_) > 1 ? kClaimsPerThread : kWeightClaimsPerThread;
    return std::min(per_thread * step.num_threads(), num_parts(places_of(step, places_), step));
  }

  void run(const Step& step, int64_t item) const override {
    const Places places = places_of(step, places_);
    const int64_t items = num_items(step), size = num_parts(places, step);
    auto [first, last] = item_range(item, items, size);
    for (int64_t g = 0; g < places.num_groups() && last > 0; ++g) {
      const int64_t rows = places.group(g).num_rows, group_size = rows * parts_per_expert_;
      const int64_t first_part = std::clamp<int64_t>(first, 0, group_size) / rows;
      const int64_t last_part = std::clamp<int64_t>(last, 0, group_size) / rows;
      if (first_part < last_part) parts(step, places, places.group(g), first_part, last_part);
      first -= group_size;
      last -= group_size;
    }
  }

 protected:
  virtual void parts(const Step& step, const Places& places, const ExpertGroup& group, int64_t first,
                     int64_t last) const = 0;

 private:
  int64_t num_parts(const Places& places, const Step& step) const {
    return places.num_choices() * step.num_rows(places_) * parts_per_expert_;
  }

  int places_;
  int64_t parts_per_expert_;
};

// The tiles of the group's expert, for rows first_row .. last_row - 1 of the input.
LinearPiece piece_of(const PackedExperts& weight, const ExpertGroup& group, const Activations& input, int64_t first_row,
                     int64_t last_row) {
  const int64_t tile = weight.first_tile(group.expert);
  return {&weight.tensor(), nullptr,  input,           {}, nullptr, tile, tile + weight.num_tiles(),
          first_row,        last_row, tile * kTileRows};
}

// Parts are tiles.
class ExpertsLinear : public ExpertParts {
 public:
  ExpertsLinear(int places, int input, ActivationType type, std::shared_ptr<PackedExperts> weight, int out)
      : ExpertParts(places, weight->num_tiles()), input_(input), type_(type), weight_(std::move(weight)), out_(out) {}
  std::string name() const override { return "experts_linear " + std::to_string(weight_->rows()); }

 private:
  void parts(const Step& step, const Places& places, const ExpertGroup& group, int64_t first,
             int64_t last) const override {
    const Activations input = PlaceRows(step, input_, places).activations(type_, weight_->cols());
    const Matrix out = PlaceRows(step, out_, places).matrix(0, weight_->rows());
    for (int64_t row = 0; row < group.num_rows; row += kLinearRows) {
      const int64_t last_row = std::min<int64_t>(group.num_rows, row + kLinearRows);
      LinearPiece piece = piece_of(*weight_, group, input, group.first_place + row, group.first_place + last_row);
      piece.last_tile = piece.first_tile + last;
      piece.first_tile += first;
      piece.output = out;
      step.kernels.linear(piece);
    }
  }

  int input_;
  ActivationType type_;
  std::shared_ptr<PackedExperts> weight_;
  int out_;
};

// Parts are the runs of columns of gated_linear.h.
class ExpertsGatedLinear : public ExpertParts {
 public:
  ExpertsGatedLinear(int places, std::vector<ExpertsInput> inputs, std::vector<std::shared_ptr<PackedExperts>> weights,
                     ActivationType out_type, bool round_to_bf16, int out)
      : ExpertParts(places, ceil_div(weights[0]->rows(), kGroup)),
        inputs_(std::move(inputs)),
        weights_(std::move(weights)),
        out_type_(out_type),
        round_to_bf16_(round_to_bf16),
        out_(out) {}
  std::string name() const override { return "experts_gated_linear " + std::to_string(weights_[0]->rows()); }

 private:
  void parts(const Step& step, const Places& places, const ExpertGroup& group, int64_t first,
             int64_t last) const override {
    const Activations out = PlaceRows(step, out_, places).activations(out_type_, weights_[0]->rows());
    for (int64_t row = 0; row < group.num_rows; row += kLinearRows) {
      const int64_t last_row = std::min<int64_t>(group.num_rows, row + kLinearRows);
      gated_linear(step.kernels,
                   {piece(0, step, places, group, row, last_row), piece(1, step, places, group, row, last_row), out,
                    group.first_place + row, round_to_bf16_},
                   first, last);
    }
  }

  LinearPiece piece(size_t w, const Step& step, const Places& places, const ExpertGroup& group, int64_t first_row,
                    int64_t last_row) const {
    const PackedExperts& weight = *weights_[w];
    const ExpertsInput& input = inputs_[w];
    return step.num_rows(input.tokens) == 1
               ? piece_of(weight, group,
                          {step.buffer(input.tokens), step.row_bytes(input.tokens), weight.cols(), input.type}, 0, 1)
               : piece_of(weight, group, PlaceRows(step, input.gathered, places).activations(input.type, weight.cols()),
                          group.first_place + first_row, group.first_place + last_row);
  }

  std::vector<ExpertsInput> inputs_;                     // of gate and of up
  std::vector<std::shared_ptr<PackedExperts>> weights_;  // gate and up
  ActivationType out_type_;
  bool round_to_bf16_;
  int out_;
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
                             std::shared_ptr<PackedExperts> weight, int out_buffer) {
  append(std::make_unique<ExpertsLinear>(places_buffer, input_buffer, type, std::move(weight), out_buffer));
}

void Program::experts_gated_linear(int places_buffer, std::vector<ExpertsInput> inputs,
                                   std::vector<std::shared_ptr<PackedExperts>> weights, ActivationType out_type,
                                   bool round_to_bf16, int out_buffer) {
  expect(weights.size() == 2 && inputs.size() == 2, "[experts_gated_linear] expected gate and up");
  const PackedExperts &gate = *weights[0], &up = *weights[1];
  expect(gate.rows() == up.rows() && gate.cols() == up.cols() && gate.num_experts() == up.num_experts(),
         "[experts_gated_linear] expected weights of one shape and number of experts");
  expect(!is_integer(out_type) || gate.rows() % kGroup == 0, "[experts_gated_linear] expected columns in groups of 32");
  append(std::make_unique<ExpertsGatedLinear>(places_buffer, std::move(inputs), std::move(weights), out_type,
                                              round_to_bf16, out_buffer));
}

void Program::combine(Operand weights, int places_buffer, int x_buffer, Operand out) {
  append(std::make_unique<Combine>(weights, places_buffer, x_buffer, out));
}

}  // namespace jinn
