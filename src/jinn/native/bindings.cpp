// What Python sees of the native code: a table of contents.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>

#include "kernels.h"
#include "kv_cache.h"
#include "packed.h"
#include "program.h"
#include "sample.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace jinn {
namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Words = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using IntTable = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstFloatTable = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatTable = nb::ndarray<nb::numpy, float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatStack = nb::ndarray<nb::numpy, float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

void expect(bool condition, const std::string& what) {
  if (!condition) throw std::invalid_argument(what);
}

std::vector<float> to_vector(const Floats& values) { return {values.data(), values.data() + values.size()}; }

std::vector<std::vector<float>> to_vectors(const std::vector<Floats>& arrays) {
  std::vector<std::vector<float>> vectors;
  for (const Floats& values : arrays) vectors.push_back(to_vector(values));
  return vectors;
}

FloatTable owned_table(float* data, size_t rows, size_t cols) {
  const nb::capsule owner(data, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  return FloatTable(data, {rows, cols}, owner);
}

// Lets the pages go that hold nothing but these bytes of a mapped file; they are read again when touched.
void drop_pages(const uint8_t* data, size_t bytes) {
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

// The path and offset of packed weights.
using Place = std::pair<std::string, size_t>;

FileRange range_of(const Place& place, bool is_writable) { return {place.first, place.second, is_writable}; }

// With all threads. Pages of a mapped file go as soon as they are packed, where its rows stay in order.
std::shared_ptr<PackedTensor> pack(ThreadPool& pool, const Bytes& data, const std::string& format, int64_t rows,
                                   int64_t cols, const Ints* row_order, const FileRange* file, bool is_mapped) {
  auto packed = std::make_shared<PackedTensor>(format_by_name(format), rows, cols, file);
  const FormatInfo& f = info(packed->format());
  expect(static_cast<int64_t>(data.size()) == rows * (cols / f.block_elems) * f.block_bytes,
         "[pack] data is not rows * cols of " + format);
  const int32_t* order = nullptr;
  if (row_order) {
    expect(static_cast<int64_t>(row_order->size()) == rows, "[pack] expected one source row per row");
    order = row_order->data();
    for (int64_t i = 0; i < rows; ++i) expect(order[i] >= 0 && order[i] < rows, "[pack] source row out of range");
  }
  const int64_t tiles_per_item = 64;
  const uint8_t* source = data.data();
  nb::gil_scoped_release release;
  const int64_t item_bytes = tiles_per_item * kTileRows * (cols / f.block_elems) * f.block_bytes;
  const int64_t source_bytes = static_cast<int64_t>(data.size());
  pool.for_each((packed->num_tiles() + tiles_per_item - 1) / tiles_per_item, [&](int64_t item) {
    packed->pack(source, order, item * tiles_per_item, std::min(packed->num_tiles(), (item + 1) * tiles_per_item));
    if (!is_mapped || order) return;
    const int64_t first = item * item_bytes;
    drop_pages(source + first, static_cast<size_t>(std::min(item_bytes, source_bytes - first)));
  });
  if (file) packed->memory().drop_pages();
  return packed;
}

FloatTable dequantize(const PackedTensor& packed) {
  float* values = new float[static_cast<size_t>(packed.rows() * packed.cols())];
  for (int64_t row = 0; row < packed.rows(); ++row) packed.dequantize_row(row, values + row * packed.cols());
  return owned_table(values, static_cast<size_t>(packed.rows()), static_cast<size_t>(packed.cols()));
}

// One matrix per source, all experts' with all threads. Pages of a mapped file go as soon as they are packed.
std::shared_ptr<PackedExperts> pack_experts(ThreadPool& pool, const std::vector<Bytes>& sources,
                                            const std::string& format, int64_t rows, int64_t cols,
                                            const Ints* row_order, const FileRange* file, bool is_mapped) {
  const int64_t num_experts = static_cast<int64_t>(sources.size());
  expect(num_experts > 0, "[pack_experts] expected a source per expert");
  auto packed = std::make_shared<PackedExperts>(format_by_name(format), num_experts, rows, cols, file);
  const FormatInfo& f = info(packed->format());
  const int64_t row_bytes = cols / f.block_elems * f.block_bytes;
  const int64_t source_rows = row_bytes ? static_cast<int64_t>(sources[0].size()) / row_bytes : 0;
  for (const Bytes& source : sources) {
    expect(static_cast<int64_t>(source.size()) == source_rows * row_bytes,
           "[pack_experts] sources are not the same whole rows of " + format);
  }
  if (row_order) {
    expect(static_cast<int64_t>(row_order->size()) == rows, "[pack_experts] expected one source row per row");
    for (int64_t i = 0; i < rows; ++i) {
      expect(row_order->data()[i] >= 0 && row_order->data()[i] < source_rows, "[pack_experts] source row out of range");
    }
  } else {
    expect(source_rows == rows, "[pack_experts] sources are not rows * cols of " + format);
  }
  const std::vector<int32_t> order = packed->source_rows(row_order ? row_order->data() : nullptr);
  std::vector<const uint8_t*> data;
  for (const Bytes& source : sources) data.push_back(source.data());
  nb::gil_scoped_release release;
  const size_t source_bytes = sources[0].size();
  pool.for_each(num_experts, [&](int64_t expert) {
    const uint8_t* source = data[static_cast<size_t>(expert)];
    packed->pack(expert, source, order, 0, packed->num_tiles());
    if (is_mapped) drop_pages(source, source_bytes);
  });
  if (file) packed->tensor().memory().drop_pages();
  return packed;
}

FloatStack dequantize_experts(const PackedExperts& packed) {
  const size_t num_experts = static_cast<size_t>(packed.num_experts()), rows = static_cast<size_t>(packed.rows());
  const size_t cols = static_cast<size_t>(packed.cols());
  float* values = new float[num_experts * rows * cols];
  const nb::capsule owner(values, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  for (size_t i = 0; i < num_experts * rows; ++i) {
    packed.dequantize_row(static_cast<int64_t>(i / rows), static_cast<int64_t>(i % rows), values + i * cols);
  }
  return FloatStack(values, {num_experts, rows, cols}, owner);
}

ActivationType activation_by_name(const std::string& name) {
  if (name == "int8") return ActivationType::Int8;
  if (name == "mixed") return ActivationType::Mixed;
  if (name == "int12") return ActivationType::Int12;
  if (name == "bf16") return ActivationType::BF16;
  if (name == "f32") return ActivationType::F32;
  throw std::invalid_argument("activation type " + name + " is not one of int12, mixed, int8, bf16, f32");
}

// ops/protocol.py's StateSpec, field by field.
using SpecTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t>;

StateSpec state_spec(const SpecTuple& fields) {
  const auto& [num_key_heads, num_value_heads, key_dim, value_dim, conv_kernel] = fields;
  return {num_key_heads, num_value_heads, key_dim, value_dim, conv_kernel};
}

// ops/protocol.py's Batch, field by field.
using BatchArrays = std::tuple<Ints, Ints, Ints, Ints, IntTable, Ints, Ints, Ints, Ints, ConstFloatTable, Ints>;

// Checks every size and index before the kernels use it.
BatchView view_of(const BatchArrays& arrays, const Program& program, const KVCache& cache, const StateCache* states,
                  int64_t vocab_size) {
  const auto& [token_ids, positions, query_start, context_lens, block_tables, logit_rows, state_slots, num_drafts,
               num_accepted, hidden, adapters] = arrays;
  BatchView b;
  b.token_ids = token_ids.data(), b.positions = positions.data(), b.query_start = query_start.data();
  b.context_lens = context_lens.data(), b.block_tables = block_tables.data(), b.logit_rows = logit_rows.data();
  const size_t num_tokens = token_ids.size(), num_seqs = context_lens.size();
  b.num_tokens = static_cast<int64_t>(num_tokens), b.num_seqs = static_cast<int64_t>(num_seqs);
  b.max_blocks = static_cast<int64_t>(block_tables.shape(1)), b.num_rows = static_cast<int64_t>(logit_rows.size());
  expect(num_tokens > 0 && num_seqs > 0, "[batch] is empty");
  expect(positions.size() == num_tokens, "[batch] expected a position per token");
  expect(query_start.size() == num_seqs + 1, "[batch] expected num_seqs + 1 query_start");
  expect(block_tables.shape(0) == num_seqs, "[batch] expected a block table per sequence");
  if (program.hidden_cols() > 0) {
    expect(hidden.shape(0) == num_tokens && static_cast<int64_t>(hidden.shape(1)) == program.hidden_cols(),
           "[batch] expected hidden states of each token");
    b.hidden = {const_cast<float*>(hidden.data()), program.hidden_cols(), program.hidden_cols()};
  }
  if (!program.state_specs().empty()) {
    expect(states && states->layers() == program.state_specs(), "[batch] expected the states of the program's layers");
    expect(state_slots.size() == num_seqs && num_drafts.size() == num_seqs && num_accepted.size() == num_seqs,
           "[batch] expected a state slot and its drafts per sequence");
    b.state_slots = state_slots.data(), b.num_drafts = num_drafts.data(), b.num_accepted = num_accepted.data();
  }
  if (adapters.size() > 0) {
    expect(adapters.size() == num_seqs, "[batch] expected an adapter per sequence, or none");
    b.adapters = adapters.data();
  }
  check_batch(b, cache, program.state_specs().empty() ? nullptr : states, vocab_size, program.num_adapters());
  return b;
}

void check_allowed(const SampleRequest& request, int64_t vocab_size) {
  expect(request.allowed.empty() || static_cast<int64_t>(request.allowed.size()) == (vocab_size + 31) / 32,
         "[sample] expected a bit per id in allowed");
}

FloatTable copy_rows(const Matrix& matrix, int64_t rows) {
  float* values = new float[static_cast<size_t>(rows * matrix.cols)];
  for (int64_t r = 0; r < rows; ++r) std::copy_n(matrix.row(r), matrix.cols, values + r * matrix.cols);
  return owned_table(values, static_cast<size_t>(rows), static_cast<size_t>(matrix.cols));
}

// The logits of the last run, until the next one.
class Logits {
 public:
  Logits(std::shared_ptr<Program> program, const Outputs& outputs, const BatchView& batch)
      : program_(std::move(program)),
        matrix_(outputs.logits),
        rows_(batch.num_rows),
        hidden_(outputs.hidden),
        num_tokens_(batch.num_tokens) {}

  FloatTable copy() const { return copy_rows(matrix_, rows_); }

  FloatTable copy_hidden() const {
    expect(hidden_.data != nullptr, "[logits] the program keeps no hidden states");
    return copy_rows(hidden_, num_tokens_);
  }

  std::vector<Sampled> sample_rows(const std::vector<const SampleRequest*>& requests) const {
    expect(static_cast<int64_t>(requests.size()) == rows_, "[sample] expected a request per row");
    for (const SampleRequest* request : requests) check_allowed(*request, matrix_.cols);
    std::vector<Sampled> sampled(requests.size());
    nb::gil_scoped_release release;
    program_->pool().for_each(rows_, [&](int64_t r) {
      const size_t i = static_cast<size_t>(r);
      sampled[i] = jinn::sample(program_->kernels(), matrix_.row(r), matrix_.cols, *requests[i]);
    });
    return sampled;
  }

 private:
  std::shared_ptr<Program> program_;
  Matrix matrix_;
  int64_t rows_;
  Matrix hidden_;
  int64_t num_tokens_;
};

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Bytes per second that all threads read together, best of `repeats`.
double read_bandwidth(ThreadPool& pool, const Kernels& kernels, int64_t bytes, int repeats) {
  nb::gil_scoped_release release;
  const Memory memory(static_cast<size_t>(bytes), true);
  uint8_t* data = memory.data();
  const size_t share = static_cast<size_t>(bytes / pool.size()) / 256 * 256;
  pool.run([&](int thread) { std::fill_n(data + share * static_cast<size_t>(thread), share, uint8_t{1}); });
  double best = 0;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](int thread) {
      uint32_t sink = 0;
      kernels.read_bytes(data + share * static_cast<size_t>(thread), share, &sink);
      asm volatile("" : : "r"(sink));
    });
    best = std::max(best, static_cast<double>(share) * pool.size() / seconds_since(start));
  }
  return best;
}

// Operations per second of all threads together, best of `repeats` of about 50 ms each.
double peak(ThreadPool& pool, const Kernels& kernels, Peak kind, int repeats) {
  nb::gil_scoped_release release;
  int64_t rounds = 100'000;
  double best = 0;
  for (int i = 0; i < repeats + 1; ++i) {
    std::atomic<int64_t> operations{0};
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](int) {
      uint32_t sink = 0;
      operations += kernels.peak(kind, rounds, &sink);
      asm volatile("" : : "r"(sink));
    });
    const double seconds = seconds_since(start);
    best = std::max(best, static_cast<double>(operations) / seconds);
    if (i == 0) rounds = std::max<int64_t>(rounds, static_cast<int64_t>(static_cast<double>(rounds) * 0.05 / seconds));
  }
  return best;
}

std::vector<std::string> isa_names() {
  const Kernels* available[8];
  std::vector<std::string> names;
  for (int i = 0, count = available_kernels(available, 8); i < count; ++i) names.emplace_back(available[i]->name);
  return names;
}

}  // namespace

NB_MODULE(_native, m) {
  m.attr("layout_id") = kLayoutId;
  m.attr("group_size") = kGroup;
  m.def("default_num_threads", &default_num_threads,
        "Physical cores this process may use, at most the cgroup's quota.");
  m.def("isa_names", &isa_names, "Instruction sets this machine can run, best first.");

  nb::class_<Kernels>(m, "Kernels", "One instruction set's kernels.").def_prop_ro("name", [](const Kernels& k) {
    return std::string(k.name);
  });
  m.def(
      "choose_kernels", [](const std::string& name) { return &choose_kernels(name.c_str()); }, "name"_a,
      nb::rv_policy::reference, "The named instruction set, or the best for an empty name.");

  nb::class_<ThreadPool>(m, "ThreadPool", "Threads that run kernels together.")
      .def(nb::init<int>(), "num_threads"_a)
      .def_prop_ro("num_threads", &ThreadPool::size);

  nb::class_<PackedTensor>(m, "PackedTensor", "A weight [rows, cols] as the kernels read it.")
      .def_prop_ro("shape", [](const PackedTensor& p) { return std::make_tuple(p.rows(), p.cols()); })
      .def_prop_ro("format", [](const PackedTensor& p) { return std::string(info(p.format()).name); })
      .def_prop_ro("nbytes", &PackedTensor::nbytes)
      .def("dequantize", &dequantize, "The values, float32 [rows, cols].");
  m.def(
      "pack",
      [](ThreadPool& pool, const Bytes& data, const std::string& format, int64_t rows, int64_t cols,
         nb::object row_order, const std::optional<Place>& place, bool is_mapped) {
        const FileRange range = range_of(place.value_or(Place()), true);
        const FileRange* file = place ? &range : nullptr;
        if (row_order.is_none()) return pack(pool, data, format, rows, cols, nullptr, file, is_mapped);
        const Ints order = nb::cast<Ints>(row_order);
        return pack(pool, data, format, rows, cols, &order, file, is_mapped);
      },
      "pool"_a, "data"_a, "format"_a, "rows"_a, "cols"_a, "row_order"_a.none() = nb::none(),
      "place"_a.none() = nb::none(), "is_mapped"_a = false,
      "Pack the file's bytes of a tensor; row i of the result is row row_order[i] of the file. `place` is the path and "
      "offset of where to keep them, instead of memory. Pages of data that is a mapped file's go.");
  m.def(
      "map_packed",
      [](const Place& place, const std::string& format, int64_t rows, int64_t cols) {
        const FileRange range = range_of(place, false);
        return std::make_shared<PackedTensor>(format_by_name(format), rows, cols, &range);
      },
      "place"_a, "format"_a, "rows"_a, "cols"_a, "A tensor that pack left in a file.");

  nb::class_<PackedExperts>(m, "PackedExperts", "A weight [experts, rows, cols] as the kernels read it.")
      .def_prop_ro("shape", [](const PackedExperts& p) { return std::make_tuple(p.num_experts(), p.rows(), p.cols()); })
      .def_prop_ro("format", [](const PackedExperts& p) { return std::string(info(p.format()).name); })
      .def_prop_ro("nbytes", &PackedExperts::nbytes)
      .def("dequantize", &dequantize_experts, "The values, float32 [experts, rows, cols].");
  m.def(
      "pack_experts",
      [](ThreadPool& pool, const std::vector<Bytes>& sources, const std::string& format, int64_t rows, int64_t cols,
         nb::object row_order, const std::optional<Place>& place, bool is_mapped) {
        const FileRange range = range_of(place.value_or(Place()), true);
        const FileRange* file = place ? &range : nullptr;
        if (row_order.is_none()) return pack_experts(pool, sources, format, rows, cols, nullptr, file, is_mapped);
        const Ints order = nb::cast<Ints>(row_order);
        return pack_experts(pool, sources, format, rows, cols, &order, file, is_mapped);
      },
      "pool"_a, "sources"_a, "format"_a, "rows"_a, "cols"_a, "row_order"_a.none() = nb::none(),
      "place"_a.none() = nb::none(), "is_mapped"_a = false,
      "Pack the file's bytes of one matrix per expert; row i of each is row row_order[i] of its source. `place` is "
      "the path and offset of where to keep them, instead of memory. Pages of sources that are a mapped file's go.");
  m.def(
      "map_experts",
      [](const Place& place, const std::string& format, int64_t num_experts, int64_t rows, int64_t cols) {
        const FileRange range = range_of(place, false);
        return std::make_shared<PackedExperts>(format_by_name(format), num_experts, rows, cols, &range);
      },
      "place"_a, "format"_a, "num_experts"_a, "rows"_a, "cols"_a, "Experts that pack_experts left in a file.");
  m.def(
      "packed_nbytes",
      [](const std::string& format, int64_t num_experts, int64_t rows, int64_t cols) {
        return PackedExperts::nbytes_of(format_by_name(format), num_experts, rows, cols);
      },
      "format"_a, "num_experts"_a, "rows"_a, "cols"_a, "Bytes that packed weights take; a matrix is one expert.");
  m.attr("places_per_choice") = kPlacesPerChoice;
  m.def("places_row_bytes", &Places::row_bytes, "num_choices"_a,
        "Bytes per row of the buffer that says where each row's chosen experts are computed.");

  m.def(
      "activation_stride",
      [](const std::string& type, int64_t cols) { return activation_stride(activation_by_name(type), cols); }, "type"_a,
      "cols"_a, "Bytes per row of activations of a type.");

  nb::class_<KVCache>(m, "KVCache", "Keys and values of all sequences, in blocks.")
      .def(
          "__init__",
          [](KVCache* self, const std::vector<std::tuple<int, int, int>>& layers, const std::string& dtype,
             int64_t num_blocks, int block_size) {
            std::vector<KVCache::Spec> specs;
            for (const auto& [heads, key_dim, value_dim] : layers) specs.push_back({heads, key_dim, value_dim});
            new (self) KVCache(specs, cache_type_by_name(dtype), num_blocks, block_size);
          },
          "layers"_a, "dtype"_a, "num_blocks"_a, "block_size"_a)
      .def_prop_ro("num_blocks", &KVCache::num_blocks)
      .def_prop_ro("block_size", &KVCache::block_size)
      .def_prop_ro("block_bytes", &KVCache::block_bytes)
      .def(
          "copy_block",
          [](KVCache& c, int64_t source, int64_t target) {
            expect(source >= 0 && source < c.num_blocks() && target >= 0 && target < c.num_blocks(),
                   "[kv_cache] no such block");
            c.copy_block(source, target);
          },
          "source"_a, "target"_a)
      .def(
          "fill_block",
          [](KVCache& c, int64_t block, uint8_t byte) {
            expect(block >= 0 && block < c.num_blocks(), "[kv_cache] no such block");
            c.fill_block(block, byte);
          },
          "block"_a, "byte"_a, "Set every byte of a block, to poison it.");

  nb::class_<StateCache>(m, "StateCache", "Recurrent states of all sequences, in slots.")
      .def(
          "__init__",
          [](StateCache* self, const std::vector<SpecTuple>& layers, int64_t num_slots, int64_t max_drafts) {
            std::vector<StateSpec> specs;
            for (const SpecTuple& layer : layers) specs.push_back(state_spec(layer));
            new (self) StateCache(specs, num_slots, max_drafts);
          },
          "layers"_a, "num_slots"_a, "max_drafts"_a = 0)
      .def_prop_ro("num_slots", &StateCache::num_slots)
      .def_prop_ro("max_drafts", &StateCache::max_drafts)
      .def_prop_ro("slot_bytes", &StateCache::slot_bytes, "Of the states of one sequence.")
      .def_prop_ro("log_bytes", &StateCache::log_bytes, "Of the drafts that a slot can keep aside.")
      .def(
          "copy_slot",
          [](StateCache& c, int64_t source, int64_t target) {
            expect(source >= 0 && source < c.num_slots() && target >= 0 && target < c.num_slots(),
                   "[state_cache] no such slot");
            c.copy_slot(source, target);
          },
          "source"_a, "target"_a, "Copy the states; drafts kept aside stay behind.")
      .def(
          "fill_slot",
          [](StateCache& c, int64_t slot, uint8_t byte) {
            expect(slot >= 0 && slot < c.num_slots(), "[state_cache] no such slot");
            c.fill_slot(slot, byte);
          },
          "slot"_a, "byte"_a, "Set every byte of a slot and its log, to poison them.");

  nb::class_<Operand>(m, "Operand", "Columns of a buffer.")
      .def(nb::init<int, int64_t, int64_t>(), "buffer"_a = -1, "first_col"_a = 0, "cols"_a = 0);

  nb::class_<SampleRequest>(m, "SampleRequest", "How one token is drawn.")
      .def(nb::init<>())
      .def_rw("temperature", &SampleRequest::temperature)
      .def_rw("top_k", &SampleRequest::top_k)
      .def_rw("top_p", &SampleRequest::top_p)
      .def_rw("min_p", &SampleRequest::min_p)
      .def_rw("repetition_penalty", &SampleRequest::repetition_penalty)
      .def_rw("presence_penalty", &SampleRequest::presence_penalty)
      .def_rw("frequency_penalty", &SampleRequest::frequency_penalty)
      .def_rw("seed", &SampleRequest::seed)
      .def_rw("position", &SampleRequest::position)
      .def_rw("num_logprobs", &SampleRequest::num_logprobs)
      .def_rw("banned_ids", &SampleRequest::banned_ids)
      .def_rw("bias_ids", &SampleRequest::bias_ids)
      .def_rw("bias", &SampleRequest::bias)
      .def(
          "set_seen",
          [](SampleRequest& r, const Ints& ids, const Ints& counts) {
            expect(ids.size() == counts.size(), "[sample] expected a count per seen id");
            r.seen_ids.assign(ids.data(), ids.data() + ids.size());
            r.output_counts.assign(counts.data(), counts.data() + counts.size());
          },
          "ids"_a, "counts"_a)
      .def(
          "set_allowed",
          [](SampleRequest& r, const Words& bits) { r.allowed.assign(bits.data(), bits.data() + bits.size()); },
          "bits"_a, "Bit i % 32 of word i / 32 says whether id i may be drawn; uint32 [ceil(vocab_size / 32)].");
  nb::class_<Sampled>(m, "Sampled", "The drawn id, -1 where the logits were not finite or nothing was left to draw.")
      .def_ro("token_id", &Sampled::token_id)
      .def_ro("logprob", &Sampled::logprob)
      .def_ro("top_ids", &Sampled::top_ids)
      .def_ro("top_logprobs", &Sampled::top_logprobs);
  m.def(
      "sample_row",
      [](const Kernels& kernels, const Floats& logits, const SampleRequest& request) {
        std::vector<float> row = to_vector(logits);
        check_allowed(request, static_cast<int64_t>(row.size()));
        return sample(kernels, row.data(), static_cast<int64_t>(row.size()), request);
      },
      "kernels"_a, "logits"_a, "request"_a, "Draw from one row of logits.");
  m.def("uniform", &uniform, "seed"_a, "position"_a, "The random number in [0, 1) of (seed, position).");

  nb::class_<Logits>(m, "Logits", "The rows of the last run, valid until the next.")
      .def("copy", &Logits::copy, "float32 [rows, vocab_size].")
      .def("copy_hidden", &Logits::copy_hidden, "What the head read, float32 [tokens, hidden_size].")
      .def("sample", &Logits::sample_rows, "requests"_a, "Draw one token per row.");

  nb::class_<Program>(m, "Program", "A recorded model.")
      .def(
          "__init__",
          [](Program* self, std::shared_ptr<ThreadPool> pool, const Kernels& kernels) {
            new (self) Program(std::move(pool), kernels);
          },
          "pool"_a, "kernels"_a)
      .def(
          "add_buffer",
          [](Program& p, bool is_logits, int64_t row_bytes, int slot) {
            return p.add_buffer(is_logits ? Rows::Logits : Rows::Tokens, row_bytes, slot);
          },
          "is_logits"_a, "row_bytes"_a, "slot"_a)
      .def("begin_stage", &Program::begin_stage)
      .def("embed", &Program::embed, "out"_a, "table"_a)
      .def(
          "quantize",
          [](Program& p, Operand x, const std::string& type, bool round_to_bf16, int out) {
            p.quantize(x, activation_by_name(type), round_to_bf16, out);
          },
          "x"_a, "type"_a, "round_to_bf16"_a, "out"_a)
      .def(
          "linear",
          [](Program& p, int input, const std::string& type, std::vector<std::shared_ptr<PackedTensor>> weights,
             const std::vector<Floats>& biases, std::vector<Operand> outputs, Operand residual) {
            p.linear(input, activation_by_name(type), std::move(weights), to_vectors(biases), std::move(outputs),
                     residual);
          },
          "input"_a, "type"_a, "weights"_a, "biases"_a, "outputs"_a, "residual"_a)
      .def(
          "gated_linear",
          [](Program& p, int input, const std::string& type, std::vector<std::shared_ptr<PackedTensor>> weights,
             const std::vector<Floats>& biases, int out, const std::string& out_type, bool round_to_bf16) {
            p.gated_linear(input, activation_by_name(type), std::move(weights), to_vectors(biases),
                           activation_by_name(out_type), round_to_bf16, out);
          },
          "input"_a, "type"_a, "weights"_a, "biases"_a, "out"_a, "out_type"_a, "round_to_bf16"_a)
      .def("adapter_linear", &Program::adapter_linear, "inputs"_a, "outputs"_a, "weights"_a, "is_sum"_a)
      .def(
          "rms_norm",
          [](Program& p, Operand x, Operand out, const Floats& weight, float eps) {
            p.rms_norm(x, out, to_vector(weight), eps);
          },
          "x"_a, "out"_a, "weight"_a, "eps"_a)
      .def("silu_mul", &Program::silu_mul, "gate"_a, "up"_a, "out"_a)
      .def("sigmoid_mul", &Program::sigmoid_mul, "x"_a, "gate"_a, "out"_a)
      .def("add", &Program::add, "a"_a, "b"_a, "out"_a)
      .def("rope_table", &Program::rope_table, "inv_freq"_a, "attention_factor"_a, "out"_a)
      .def("rope", &Program::rope, "table"_a, "num_pairs"_a, "num_heads"_a, "is_interleaved"_a, "x"_a, "out"_a)
      .def("store_kv", &Program::store_kv, "k"_a, "v"_a, "layer"_a)
      .def("attention", &Program::attention, "q"_a, "out"_a, "layer"_a, "num_kv_heads"_a, "scale"_a)
      .def(
          "route",
          [](Program& p, Operand logits, Operand scores, Operand weights, Operand ids, const Floats& bias,
             bool is_sigmoid, bool is_renormalized, int num_groups, int num_chosen_groups, float scaling) {
            const RouteSpec spec{is_sigmoid, is_renormalized, static_cast<int>(ids.cols), num_groups, num_chosen_groups,
                                 scaling,    nullptr};
            p.route(logits, spec, to_vector(bias), scores, weights, ids);
          },
          "logits"_a, "scores"_a, "weights"_a, "ids"_a, "bias"_a, "is_sigmoid"_a, "is_renormalized"_a, "num_groups"_a,
          "num_chosen_groups"_a, "scaling"_a)
      .def("group_rows", &Program::group_rows, "ids"_a, "num_experts"_a, "places"_a)
      .def(
          "gather",
          [](Program& p, int places, int x, int out, const std::string& type, int64_t cols) {
            p.gather(places, x, activation_by_name(type), cols, out);
          },
          "places"_a, "x"_a, "out"_a, "type"_a, "cols"_a)
      .def(
          "experts_linear",
          [](Program& p, int places, int x, int out, const std::string& type, std::shared_ptr<PackedExperts> weight) {
            p.experts_linear(places, x, activation_by_name(type), std::move(weight), out);
          },
          "places"_a, "x"_a, "out"_a, "type"_a, "weight"_a)
      .def(
          "experts_gated_linear",
          [](Program& p, int places, const std::vector<std::tuple<int, int, std::string>>& inputs,
             std::vector<std::shared_ptr<PackedExperts>> weights, int out, const std::string& out_type,
             bool round_to_bf16) {
            std::vector<ExpertsInput> typed;
            for (const auto& [tokens, gathered, name] : inputs) {
              typed.push_back({tokens, gathered, activation_by_name(name)});
            }
            p.experts_gated_linear(places, std::move(typed), std::move(weights), activation_by_name(out_type),
                                   round_to_bf16, out);
          },
          "places"_a, "inputs"_a, "weights"_a, "out"_a, "out_type"_a, "round_to_bf16"_a,
          "Of gate and up: the input by token, the same by place, and its type.")
      .def(
          "combine",
          [](Program& p, int places, int x, Operand weights, Operand out) { p.combine(weights, places, x, out); },
          "places"_a, "x"_a, "weights"_a, "out"_a)
      .def("select_rows", &Program::select_rows, "x"_a, "out"_a)
      .def("split_heads", &Program::split_heads, "x"_a, "outputs"_a, "num_heads"_a)
      .def("join_heads", &Program::join_heads, "values"_a, "out"_a, "num_heads"_a)
      .def(
          "head_linear",
          [](Program& p, int input, const std::string& type, std::shared_ptr<PackedExperts> weight, Operand out) {
            p.head_linear(input, activation_by_name(type), std::move(weight), out);
          },
          "input"_a, "type"_a, "weight"_a, "out"_a)
      .def(
          "causal_conv1d",
          [](Program& p, Operand x, Operand out, int layer, const SpecTuple& spec, const ConstFloatTable& taps) {
            p.causal_conv1d(x, out, layer, state_spec(spec), {taps.data(), taps.data() + taps.size()});
          },
          "x"_a, "out"_a, "layer"_a, "spec"_a, "taps"_a)
      .def(
          "gated_delta_rule",
          [](Program& p, Operand qkv, Operand a, Operand b, Operand out, int layer, const SpecTuple& spec,
             const Floats& decay_rates, const Floats& dt_bias) {
            p.gated_delta_rule(qkv, a, b, out, layer, state_spec(spec), to_vector(decay_rates), to_vector(dt_bias));
          },
          "qkv"_a, "a"_a, "b"_a, "out"_a, "layer"_a, "spec"_a, "decay_rates"_a, "dt_bias"_a)
      .def("given_hidden", &Program::given_hidden, "out"_a)
      .def("set_logits", &Program::set_logits, "logits"_a)
      .def("set_hidden", &Program::set_hidden, "hidden"_a)
      .def_prop_ro(
          "num_barriers", [](const Program& p) { return p.pool().num_barriers(); },
          "That the pool's threads have met at so far.");

  m.def(
      "run",
      [](std::shared_ptr<Program> program, const KVCache& cache, StateCache* states, int64_t vocab_size,
         const BatchArrays& arrays) {
        const BatchView batch = view_of(arrays, *program, cache, states, vocab_size);
        Outputs outputs;
        {
          nb::gil_scoped_release release;
          outputs = program->run(batch, cache, states);
        }
        return Logits(std::move(program), outputs, batch);
      },
      "program"_a, "cache"_a, "states"_a.none(), "vocab_size"_a, "batch"_a, "Run a batch.");
  m.def(
      "profile",
      [](Program& program, const KVCache& cache, StateCache* states, int64_t vocab_size, const BatchArrays& arrays) {
        StageTimes times;
        program.run(view_of(arrays, program, cache, states, vocab_size), cache, states, &times);
        return times;
      },
      "program"_a, "cache"_a, "states"_a.none(), "vocab_size"_a, "batch"_a,
      "Run a batch and give the seconds of each stage.");

  m.def("read_bandwidth", &read_bandwidth, "pool"_a, "kernels"_a, "bytes"_a, "repeats"_a, "Bytes per second.");
  m.def(
      "peak",
      [](ThreadPool& pool, const Kernels& kernels, const std::string& kind, int repeats) {
        const ActivationType type = activation_by_name(kind);
        return peak(pool, kernels,
                    type == ActivationType::Int8   ? Peak::Int8
                    : type == ActivationType::BF16 ? Peak::BF16
                                                   : Peak::F32,
                    repeats);
      },
      "pool"_a, "kernels"_a, "kind"_a, "repeats"_a, "Operations per second of int8, bf16 or f32 multiply-adds.");
}

}  // namespace jinn
