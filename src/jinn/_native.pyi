from collections.abc import Sequence
from typing import Annotated

import numpy
from numpy.typing import NDArray


layout_id: int = 3

group_size: int = 32

def default_num_threads() -> int:
    """Physical cores this process may use, at most the cgroup's quota."""

def isa_names() -> list[str]:
    """Instruction sets this machine can run, best first."""

class Kernels:
    """One instruction set's kernels."""

    @property
    def name(self) -> str: ...

def choose_kernels(name: str) -> Kernels:
    """The named instruction set, or the best for an empty name."""

class ThreadPool:
    """Threads that run kernels together."""

    def __init__(self, num_threads: int) -> None: ...

    @property
    def num_threads(self) -> int: ...

class PackedTensor:
    """A weight [rows, cols] as the kernels read it."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def format(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    def dequantize(self) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]:
        """The values, float32 [rows, cols]."""

def pack(pool: ThreadPool, data: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], format: str, rows: int, cols: int, row_order: object | None = None, place: tuple[str, int] | None = None, is_mapped: bool = False) -> PackedTensor:
    """
    Pack the file's bytes of a tensor; row i of the result is row row_order[i] of the file. `place` is the path and offset of where to keep them, instead of memory. Pages of data that is a mapped file's go.
    """

def map_packed(place: tuple[str, int], format: str, rows: int, cols: int) -> PackedTensor:
    """A tensor that pack left in a file."""

class PackedExperts:
    """A weight [experts, rows, cols] as the kernels read it."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def format(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    def dequantize(self) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu')]:
        """The values, float32 [experts, rows, cols]."""

def pack_experts(pool: ThreadPool, sources: Sequence[Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]], format: str, rows: int, cols: int, row_order: object | None = None, place: tuple[str, int] | None = None, is_mapped: bool = False) -> PackedExperts:
    """
    Pack the file's bytes of one matrix per expert; row i of each is row row_order[i] of its source. `place` is the path and offset of where to keep them, instead of memory. Pages of sources that are a mapped file's go.
    """

def map_experts(place: tuple[str, int], format: str, num_experts: int, rows: int, cols: int) -> PackedExperts:
    """Experts that pack_experts left in a file."""

def packed_nbytes(format: str, num_experts: int, rows: int, cols: int) -> int:
    """Bytes that packed weights take; a matrix is one expert."""

places_per_choice: int = 2

def places_row_bytes(num_choices: int) -> int:
    """
    Bytes per row of the buffer that says where each row's chosen experts are computed.
    """

def activation_stride(type: str, cols: int) -> int:
    """Bytes per row of activations of a type."""

class KVCache:
    """Keys and values of all sequences, in blocks."""

    def __init__(self, layers: Sequence[tuple[int, int, int]], dtype: str, num_blocks: int, block_size: int) -> None: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_size(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...

    def copy_block(self, source: int, target: int) -> None: ...

    def fill_block(self, block: int, byte: int) -> None:
        """Set every byte of a block, to poison it."""

class StateCache:
    """Recurrent states of all sequences, in slots."""

    def __init__(self, layers: Sequence[tuple[int, int, int, int, int]], num_slots: int, max_drafts: int = 0) -> None: ...

    @property
    def num_slots(self) -> int: ...

    @property
    def max_drafts(self) -> int: ...

    @property
    def slot_bytes(self) -> int:
        """Of the states of one sequence."""

    @property
    def log_bytes(self) -> int:
        """Of the drafts that a slot can keep aside."""

    def copy_slot(self, source: int, target: int) -> None:
        """Copy the states; drafts kept aside stay behind."""

    def fill_slot(self, slot: int, byte: int) -> None:
        """Set every byte of a slot and its log, to poison them."""

class Operand:
    """Columns of a buffer."""

    def __init__(self, buffer: int = -1, first_col: int = 0, cols: int = 0) -> None: ...

class SampleRequest:
    """How one token is drawn."""

    def __init__(self) -> None: ...

    @property
    def temperature(self) -> float: ...

    @temperature.setter
    def temperature(self, arg: float, /) -> None: ...

    @property
    def top_k(self) -> int: ...

    @top_k.setter
    def top_k(self, arg: int, /) -> None: ...

    @property
    def top_p(self) -> float: ...

    @top_p.setter
    def top_p(self, arg: float, /) -> None: ...

    @property
    def min_p(self) -> float: ...

    @min_p.setter
    def min_p(self, arg: float, /) -> None: ...

    @property
    def repetition_penalty(self) -> float: ...

    @repetition_penalty.setter
    def repetition_penalty(self, arg: float, /) -> None: ...

    @property
    def presence_penalty(self) -> float: ...

    @presence_penalty.setter
    def presence_penalty(self, arg: float, /) -> None: ...

    @property
    def frequency_penalty(self) -> float: ...

    @frequency_penalty.setter
    def frequency_penalty(self, arg: float, /) -> None: ...

    @property
    def seed(self) -> int: ...

    @seed.setter
    def seed(self, arg: int, /) -> None: ...

    @property
    def position(self) -> int: ...

    @position.setter
    def position(self, arg: int, /) -> None: ...

    @property
    def num_logprobs(self) -> int: ...

    @num_logprobs.setter
    def num_logprobs(self, arg: int, /) -> None: ...

    @property
    def banned_ids(self) -> list[int]: ...

    @banned_ids.setter
    def banned_ids(self, arg: Sequence[int], /) -> None: ...

    @property
    def bias_ids(self) -> list[int]: ...

    @bias_ids.setter
    def bias_ids(self, arg: Sequence[int], /) -> None: ...

    @property
    def bias(self) -> list[float]: ...

    @bias.setter
    def bias(self, arg: Sequence[float], /) -> None: ...

    def set_seen(self, ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], counts: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None: ...

    def set_allowed(self, bits: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None:
        """
        Bit i % 32 of word i / 32 says whether id i may be drawn; uint32 [ceil(vocab_size / 32)].
        """

class Sampled:
    """
    The drawn id, -1 where the logits were not finite or nothing was left to draw.
    """

    @property
    def token_id(self) -> int: ...

    @property
    def logprob(self) -> float: ...

    @property
    def top_ids(self) -> list[int]: ...

    @property
    def top_logprobs(self) -> list[float]: ...

def sample_row(kernels: Kernels, logits: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], request: SampleRequest) -> Sampled:
    """Draw from one row of logits."""

def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) of (seed, position)."""

class Logits:
    """The rows of the last run, valid until the next."""

    def copy(self) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]:
        """float32 [rows, vocab_size]."""

    def copy_hidden(self) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]:
        """What the head read, float32 [tokens, hidden_size]."""

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sampled]:
        """Draw one token per row."""

class Program:
    """A recorded model."""

    def __init__(self, pool: ThreadPool, kernels: Kernels) -> None: ...

    def add_buffer(self, is_logits: bool, row_bytes: int, slot: int) -> int: ...

    def begin_stage(self) -> None: ...

    def embed(self, out: Operand, table: PackedTensor) -> None: ...

    def quantize(self, x: Operand, type: str, round_to_bf16: bool, out: int) -> None: ...

    def linear(self, input: int, type: str, weights: Sequence[PackedTensor], biases: Sequence[Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]], outputs: Sequence[Operand], residual: Operand) -> None: ...

    def gated_linear(self, input: int, type: str, weights: Sequence[PackedTensor], biases: Sequence[Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]], out: int, out_type: str, round_to_bf16: bool) -> None: ...

    def adapter_linear(self, inputs: Sequence[Operand], outputs: Sequence[Operand], weights: Sequence[Sequence[PackedTensor]], is_sum: bool) -> None: ...

    def rms_norm(self, x: Operand, out: Operand, weight: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], eps: float) -> None: ...

    def silu_mul(self, gate: Operand, up: Operand, out: Operand) -> None: ...

    def sigmoid_mul(self, x: Operand, gate: Operand, out: Operand) -> None: ...

    def add(self, a: Operand, b: Operand, out: Operand) -> None: ...

    def rope_table(self, inv_freq: Sequence[float], attention_factor: float, out: int) -> None: ...

    def rope(self, table: int, num_pairs: int, num_heads: int, is_interleaved: bool, x: Operand, out: Operand) -> None: ...

    def store_kv(self, k: Operand, v: Operand, layer: int) -> None: ...

    def attention(self, q: Operand, out: Operand, layer: int, num_kv_heads: int, scale: float) -> None: ...

    def route(self, logits: Operand, scores: Operand, weights: Operand, ids: Operand, bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], is_sigmoid: bool, is_renormalized: bool, num_groups: int, num_chosen_groups: int, scaling: float) -> None: ...

    def group_rows(self, ids: Operand, num_experts: int, places: int) -> None: ...

    def gather(self, places: int, x: int, out: int, type: str, cols: int) -> None: ...

    def experts_linear(self, places: int, x: int, out: int, type: str, weight: PackedExperts) -> None: ...

    def experts_gated_linear(self, places: int, inputs: Sequence[tuple[int, int, str]], weights: Sequence[PackedExperts], out: int, out_type: str, round_to_bf16: bool) -> None:
        """Of gate and up: the input by token, the same by place, and its type."""

    def combine(self, places: int, x: int, weights: Operand, out: Operand) -> None: ...

    def select_rows(self, x: Operand, out: Operand) -> None: ...

    def split_heads(self, x: Operand, outputs: Sequence[Operand], num_heads: int) -> None: ...

    def join_heads(self, values: Sequence[Operand], out: Operand, num_heads: int) -> None: ...

    def head_linear(self, input: int, type: str, weight: PackedExperts, out: Operand) -> None: ...

    def causal_conv1d(self, x: Operand, out: Operand, layer: int, spec: tuple[int, int, int, int, int], taps: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)]) -> None: ...

    def gated_delta_rule(self, qkv: Operand, a: Operand, b: Operand, out: Operand, layer: int, spec: tuple[int, int, int, int, int], decay_rates: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)], dt_bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None: ...

    def given_hidden(self, out: Operand) -> None: ...

    def set_logits(self, logits: Operand) -> None: ...

    def set_hidden(self, hidden: Operand) -> None: ...

    @property
    def num_barriers(self) -> int:
        """That the pool's threads have met at so far."""

def run(program: Program, cache: KVCache, states: StateCache | None, vocab_size: int, batch: tuple[Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]]) -> Logits:
    """Run a batch."""

def profile(program: Program, cache: KVCache, states: StateCache | None, vocab_size: int, batch: tuple[Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.int32], dict(shape=(None, None), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]]) -> list[tuple[str, float]]:
    """Run a batch and give the seconds of each stage."""

def read_bandwidth(pool: ThreadPool, kernels: Kernels, bytes: int, repeats: int) -> float:
    """Bytes per second."""

def peak(pool: ThreadPool, kernels: Kernels, kind: str, repeats: int) -> float:
    """Operations per second of int8, bf16 or f32 multiply-adds."""
