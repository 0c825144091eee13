"""A Llama-family checkpoint as one GGUF file for llama.cpp and what is built on it, positions included.

How the positions travel, decided by comparing numbers and not names, from what llama.cpp computes itself:
- no scaling, or another theta only: `rope.freq_base`.
- linear: `rope.scaling.type linear` and its factor.
- YaRN: `rope.scaling.type yarn`, factor and original length, but only where llama.cpp's own formula (ramp between 32
  and 1 turns, attention factor 0.1 ln s + 1) gives the reference's numbers. For the `llama` architecture it reads
  neither `yarn_beta_*` nor `yarn_attn_factor` from the file, and how it applies the attention factor has changed more
  than once (llama.cpp pull requests 17945 and 18006).
- everything else, and all of it with `portable=True`: the tensor `rope_freqs.weight` that Llama 3.1 introduced, base /
  new per frequency, scaling type `none`, and the attention factor folded into the query and key projections: RoPE is
  linear, so scaling both is scaling cos and sin. Ollama's own Llama engine (model/models/llama/model.go) reads this
  tensor and none of `rope.scaling.*`.

`rope.scaling.type` is always written: llama.cpp takes a file without it for linear.

Query and key rows are reordered within each head, from halves (Hugging Face) to neighbouring pairs (llama.cpp's
`llama` architecture rotates dimensions 2i and 2i + 1). Nothing fails without that; the model only talks nonsense.

Weights are read and written a few rows at a time, so a model of any size takes about 100 MB of memory.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import gguf
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ctxext.errors import ArtefactError, ResourceError, UnsupportedModelError, UsageError
from ctxext.export.gguf_tokenizer import GgufVocabulary, gguf_vocabulary
from ctxext.export.stored import StoredWeights, checkpoint_tensors
from ctxext.files import format_bytes, require_free_space, write_text_atomic
from ctxext.model.load import load_config, load_tokenizer, resolve_source
from ctxext.rope.families import head_dim as head_dim_of
from ctxext.rope.reference import RELATIVE_TOLERANCE, reference_tables

Float64Array = npt.NDArray[np.float64]
Scaling = Literal["none", "linear", "yarn", "rope_freqs"]

# llama.cpp's own converter writes both as architecture `llama`.
_FAMILIES = ("llama", "mistral")
_FILE_TYPES = {
    torch.float32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    torch.float16: (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    torch.bfloat16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_BLOCK_ELEMENTS = 4 << 20
_FREQUENCIES = "rope_freqs.weight"
# base / new of a frequency of exactly 0: position / this is an angle whose cos is 1 and whose sin is 0 in float32.
_STANDS_STILL = 1e30


@dataclass(frozen=True)
class GgufExport:
    """What was written.

    Attributes:
        path: the GGUF file.
        modelfile: the Ollama Modelfile beside it.
        scaling: how the positions travel.
        folded_attention_factor: what the query and key projections were multiplied by; 1 when nothing was folded.
        dtype: of the matrices; norms, biases and frequencies are float32.
        notes: what a user should know of this file.
    """

    path: Path
    modelfile: Path
    scaling: Scaling
    folded_attention_factor: float
    dtype: str
    num_tensors: int
    num_bytes: int
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line for people."""
        fold = self.folded_attention_factor
        folded = f", attention factor {fold:.4f} folded into q and k" if fold != 1 else ""
        size = f"{self.num_tensors} tensors, {self.dtype}, {format_bytes(self.num_bytes)}"
        return f"{self.path.name}: {size}; positions: {self.scaling}{folded}"


@dataclass(frozen=True)
class GgufPositions:
    """RoPE in GGUF's terms.

    Attributes:
        theta: `rope.freq_base`.
        factor, original_length: of a native scaling.
        frequency_factors: content of `rope_freqs.weight`, float32 [head_dim / 2].
        folded: what to multiply the query and key projections by.
    """

    scaling: Scaling
    theta: float
    factor: float | None = None
    original_length: int | None = None
    frequency_factors: npt.NDArray[np.float32] | None = None
    folded: float = 1.0


@dataclass(frozen=True)
class _Tensor:
    """One tensor to write: where it comes from and what happens to it on the way.

    Attributes:
        stored: name in the checkpoint; None for values that come from elsewhere.
        heads: for query and key projections the number of heads, whose rows are reordered.
        scale: what the values are multiplied by.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: str | None
    heads: int | None = None
    scale: float = 1.0
    values: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def export_gguf(
    checkpoint: Path, destination: Path, *, dtype: str = "auto", portable: bool = False, pre: str | None = None
) -> GgufExport:
    """Write a checkpoint folder as the GGUF file `destination`, with an Ollama Modelfile beside it.

    Args:
        checkpoint: folder with config, tokenizer and safetensors weights, as merged or patched by ctxext or plain.
        destination: the file to write; its folder is made.
        dtype: of the matrices: `float32`, `float16`, `bfloat16`, or `auto`, which keeps the checkpoint's.
        portable: carry any scaling as `rope_freqs.weight`, for readers that ignore `rope.scaling.*`.
        pre: llama.cpp's name of the pre-tokenizer, for a tokenizer that is not recognised.

    Raises:
        UnsupportedModelError: not a Llama, or its positions or tokenizer have no counterpart in llama.cpp.
        ArtefactError: the checkpoint is incomplete or damaged, or `destination` exists.
        ResourceError: not enough disk.
        UsageError: unknown dtype, or `destination` is not called *.gguf.
    """
    if destination.suffix != ".gguf":
        raise UsageError("the destination must be called *.gguf", where="--gguf", got=str(destination))
    modelfile = destination.with_suffix(".Modelfile")
    for path in (destination, modelfile):
        if path.exists():
            raise ArtefactError("the destination exists already", where=str(path), hint="Choose another name.")
    if not checkpoint.is_dir():
        raise ArtefactError("the checkpoint is not a folder", where=str(checkpoint))
    source = resolve_source(str(checkpoint.absolute()))
    config: Any = load_config(source)
    positions = gguf_positions(config, portable=portable)
    weights = checkpoint_tensors(checkpoint)
    matrix_dtype = _matrix_dtype(dtype, weights)
    tensors = _plan_tensors(config, weights, positions, matrix_dtype)
    vocabulary = gguf_vocabulary(load_tokenizer(source), _embedding_rows(config, tensors), pre)
    require_free_space(destination.parent, sum(tensor.num_bytes for tensor in tensors), "the GGUF file")
    with _file_atomic(destination) as partial:
        writer = gguf.GGUFWriter(partial, "llama")
        _write_metadata(writer, config, positions, vocabulary, matrix_dtype, checkpoint.absolute().name)
        _write_tensors(writer, tensors, weights)
        write_text_atomic(modelfile, modelfile_text(destination.name, config))
    notes = list(vocabulary.notes)
    if positions.factor is not None:
        notes.append(
            f"llama.cpp reads the {positions.scaling} scaling of this file, Ollama's own engine may not: "
            "--portable writes a form that both read"
        )
    if positions.folded != 1 and matrix_dtype != torch.float32:
        notes.append("folding the attention factor rounded the query and key projections once more")
    return GgufExport(
        path=destination,
        modelfile=modelfile,
        scaling=positions.scaling,
        folded_attention_factor=positions.folded,
        dtype=str(matrix_dtype).removeprefix("torch."),
        num_tensors=len(tensors),
        num_bytes=destination.stat().st_size,
        notes=tuple(notes),
    )


def gguf_positions(config: Any, *, portable: bool = False) -> GgufPositions:
    """How llama.cpp is told the positions that `config` means.

    Raises:
        UnsupportedModelError: not a Llama, or positions that llama.cpp cannot follow for it.
    """
    _refuse_other_families(config)
    tables = reference_tables(config)
    parameters: dict[str, Any] = config.rope_parameters
    if set(tables) != {None}:
        raise _unsupported("one RoPE per layer type", ", ".join(map(str, tables)))
    table = tables[None]
    if parameters.get("rope_type") == "dynamic":
        raise _unsupported("frequencies that depend on the length of each prompt", "dynamic")
    if table.short_inv_freq is not None:
        # llama.cpp chooses the list by the context it was started with, transformers by the length of the prompt.
        raise _unsupported("LongRoPE with one list for short and one for long prompts", "two-range longrope")
    if 2 * len(table.inv_freq) != head_dim_of(config):
        raise _unsupported("heads that are rotated in part", f"{2 * len(table.inv_freq)} of {head_dim_of(config)}")
    theta = float(parameters["rope_theta"])
    reference = table.inv_freq.astype(np.float64)
    unscaled = _powers(theta, head_dim_of(config))
    if _same(reference, unscaled) and table.attention_factor == 1:
        return GgufPositions("none", theta)
    original = int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)
    factor = float(parameters.get("factor") or config.max_position_embeddings / original)
    if not portable and _same(reference, unscaled / factor) and table.attention_factor == 1:
        return GgufPositions("linear", theta, factor=factor)
    if (
        not portable
        and parameters.get("rope_type") == "yarn"
        and _same(reference, llama_cpp_yarn(theta, head_dim_of(config), factor, original))
        and math.isclose(table.attention_factor, 0.1 * math.log(factor) + 1, rel_tol=1e-6)
    ):
        return GgufPositions("yarn", theta, factor=factor, original_length=original)
    with np.errstate(divide="ignore"):
        ratios = np.minimum(unscaled / reference, _STANDS_STILL).astype(np.float32)
    return GgufPositions("rope_freqs", theta, frequency_factors=ratios, folded=table.attention_factor)


def llama_cpp_yarn(theta: float, head_dim: int, factor: float, original_length: int) -> Float64Array:
    """The frequencies that llama.cpp rotates by under `rope.scaling.type yarn`, with the ramp's ends it assumes."""
    dimensions = [
        head_dim * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (32, 1)
    ]
    low, high = max(0, math.floor(dimensions[0])), min(head_dim - 1, math.ceil(dimensions[1]))
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(0.001, high - low), 0, 1)
    unscaled = _powers(theta, head_dim)
    return np.asarray(unscaled / factor * ramp + unscaled * (1 - ramp), dtype=np.float64)


def modelfile_text(name: str, config: Any) -> str:
    """An Ollama Modelfile for the GGUF file `name` in the same folder."""
    length = int(config.max_position_embeddings)
    heads = config.num_key_value_heads or config.num_attention_heads
    cache = format_bytes(2 * 2 * config.num_hidden_layers * heads * head_dim_of(config) * length)
    return f"""# ollama create NAME -f {Path(name).stem}.Modelfile
FROM ./{name}

# All positions of the model. The cache for them takes {cache} in half precision; a smaller number takes less.
PARAMETER num_ctx {length}

# No TEMPLATE: Ollama's are Go templates. A chat template of the model is in the file as Jinja, and Ollama picks its own
# counterpart when it knows it; otherwise write TEMPLATE here. No stop: the file names the tokens that end an answer.
"""


def _refuse_other_families(config: Any) -> None:
    model_type = str(config.model_type)
    if model_type not in _FAMILIES:
        raise UnsupportedModelError(
            "GGUF files are written for the Llama family alone",
            where="model_type",
            got=model_type,
            expected=" or ".join(_FAMILIES),
            hint="Serve it with transformers or vLLM, or use llama.cpp's convert_hf_to_gguf.py, which knows "
            "linear, YaRN and Llama 3 scaling, and compare its answers on a long prompt.",
        )
    if getattr(config, "sliding_window", None):
        raise _unsupported("a sliding attention window", f"sliding_window {config.sliding_window}")
    if config.hidden_act != "silu":
        raise _unsupported("another activation than SiLU", str(config.hidden_act))


def _unsupported(what: str, got: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"llama.cpp's Llama has no counterpart for {what}",
        where="config.json",
        got=got,
        hint="Serve the checkpoint with transformers or vLLM.",
    )


def _powers(theta: float, head_dim: int) -> Float64Array:
    return np.asarray(theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim), dtype=np.float64)


def _same(left: Float64Array, right: Float64Array) -> bool:
    return bool(np.allclose(left, right, rtol=RELATIVE_TOLERANCE, atol=0))


def _matrix_dtype(asked: str, weights: StoredWeights) -> torch.dtype:
    if asked in _DTYPES:
        return _DTYPES[asked]
    if asked != "auto":
        raise UsageError("unknown dtype", where="--dtype", got=asked, expected="auto, " + ", ".join(_DTYPES))
    stored = weights.main_dtype
    return stored if stored in _FILE_TYPES else torch.float32


def _embedding_rows(config: Any, tensors: list[_Tensor]) -> int:
    (rows,) = (tensor.shape[0] for tensor in tensors if tensor.name == "token_embd.weight")
    if rows != config.vocab_size:
        raise ArtefactError(
            "the embedding's rows and the config disagree",
            where="vocab_size",
            got=config.vocab_size,
            expected=str(rows),
        )
    return rows


def _plan_tensors(
    config: Any, weights: StoredWeights, positions: GgufPositions, matrix_dtype: torch.dtype
) -> list[_Tensor]:
    """Every tensor of the file in order.

    Raises:
        ArtefactError: the checkpoint lacks tensors, or has some that a Llama has no place for.
    """
    names = _gguf_names(config, weights)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads or config.num_attention_heads}
    planned = []
    for stored, name in names.items():
        info = weights.tensors[stored]
        module = stored.split(".")[-2]
        if module in heads and info.num_rows != heads[module] * head_dim_of(config):
            raise ArtefactError(
                "the projection's rows and the config's heads disagree",
                where=stored,
                got=info.num_rows,
                expected=f"{heads[module]} heads of {head_dim_of(config)}",
            )
        planned.append(
            _Tensor(
                name,
                info.shape,
                # llama.cpp adds and multiplies vectors in float32 only.
                matrix_dtype if len(info.shape) > 1 else torch.float32,
                stored,
                heads=heads.get(module),
                scale=positions.folded if module in heads else 1.0,
            )
        )
    if positions.frequency_factors is not None:
        values = torch.from_numpy(positions.frequency_factors)
        planned.append(_Tensor(_FREQUENCIES, tuple(values.shape), torch.float32, None, values=values))
    return planned


def _gguf_names(config: Any, weights: StoredWeights) -> dict[str, str]:
    """Checkpoint name -> GGUF name of every tensor to write, checked against what a Llama needs."""
    layers = int(config.num_hidden_layers)
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    tied = bool(config.tie_word_embeddings)
    names: dict[str, str] = {}
    for stored in weights.tensors:
        if stored.endswith("rotary_emb.inv_freq") or (tied and stored == "lm_head.weight"):
            continue  # a buffer that old checkpoints hold; a second copy of the embedding
        name = table.get_name(stored, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ArtefactError(
                "the checkpoint has a tensor that llama.cpp's Llama has no place for",
                where=str(weights.folder),
                got=stored,
            )
        names[stored] = name
    needed = {"token_embd.weight", "output_norm.weight"} | (set() if tied else {"output.weight"})
    parts = "attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down".split()
    needed |= {f"blk.{layer}.{part}.weight" for layer in range(layers) for part in parts}
    missing = sorted(needed - set(names.values()))
    if missing:
        raise ArtefactError(
            "the checkpoint lacks weights that the model needs",
            where=str(weights.folder),
            got=f"{missing[0]} ({len(missing)} in all)",
        )
    return names


def _write_metadata(
    writer: Any,
    config: Any,
    positions: GgufPositions,
    vocabulary: GgufVocabulary,
    matrix_dtype: torch.dtype,
    name: str,
) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(int(_FILE_TYPES[matrix_dtype][1]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(len(vocabulary.tokens))
    writer.add_context_length(int(config.max_position_embeddings))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    writer.add_key_length(head_dim_of(config))
    writer.add_value_length(head_dim_of(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim_of(config))
    writer.add_rope_freq_base(positions.theta)
    native = positions.scaling if positions.scaling != "rope_freqs" else "none"
    writer.add_rope_scaling_type(gguf.RopeScalingType(native))
    if positions.factor is not None:
        writer.add_rope_scaling_factor(positions.factor)
    if positions.original_length is not None:
        writer.add_rope_scaling_orig_ctx_len(positions.original_length)
    _write_vocabulary(writer, vocabulary)


def _write_vocabulary(writer: Any, vocabulary: GgufVocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    if vocabulary.scores is not None:
        writer.add_token_scores(list(vocabulary.scores))
    writer.add_token_types(list(vocabulary.kinds))
    if vocabulary.merges is not None:
        writer.add_token_merges(list(vocabulary.merges))
    for kind, number in vocabulary.special.items():
        getattr(writer, f"add_{kind}_token_id")(number)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _write_tensors(writer: Any, tensors: list[_Tensor], weights: StoredWeights) -> None:
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, raw_dtype=_FILE_TYPES[tensor.dtype][0]
        )
    logger = logging.getLogger("gguf.gguf_writer")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it announces the partial file's name
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_Streamed(tensor, weights))
    finally:
        logger.setLevel(level)
        writer.close()


@dataclass(frozen=True)
class _Streamed:
    """As much of a numpy array as GGUFWriter asks for, whose values exist only a block of rows at a time."""

    tensor: _Tensor
    weights: StoredWeights

    @property
    def nbytes(self) -> int:
        return self.tensor.num_bytes

    def tofile(self, stream: BinaryIO) -> None:
        for block in _blocks(self.tensor, self.weights):
            stream.write(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _blocks(tensor: _Tensor, weights: StoredWeights) -> Iterator[Tensor]:
    """The tensor's rows as they are written, whole heads at a time where rows are reordered."""
    if tensor.stored is None:
        assert tensor.values is not None, tensor.name
        yield tensor.values
        return
    rows = tensor.shape[0]
    unit = rows // tensor.heads if tensor.heads else 1
    row_elements = math.prod(tensor.shape[1:])
    step = max(1, _BLOCK_ELEMENTS // (row_elements * unit)) * unit
    for first in range(0, rows, step):
        values = weights.read(tensor.stored, first, min(step, rows - first)).float()
        if tensor.scale != 1:
            values = values * tensor.scale
        if tensor.heads:
            values = pairs_from_halves(values, unit)
        rounded = values.to(tensor.dtype)
        if not bool(torch.isfinite(rounded).all()):
            raise ArtefactError(
                f"the weights have values that {str(tensor.dtype).removeprefix('torch.')} cannot hold",
                where=tensor.stored,
                hint="Choose --dtype bfloat16 or float32." if tensor.dtype == torch.float16 else None,
            )
        yield rounded


def pairs_from_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of whole heads [heads * head_dim, ...], reordered from (x_i, x_{i + d/2}) to neighbours (2i, 2i + 1)."""
    heads = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


@contextmanager
def _file_atomic(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` when the block ends well and is removed when it does not.

    Raises:
        ResourceError: the disk is full or not writable.
    """
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        descriptor = os.open(partial, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        os.replace(partial, path)
    except OSError as error:
        raise ResourceError(
            f"could not write ({error.strerror or error})", where=str(path), hint="Check free space and permissions."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()
