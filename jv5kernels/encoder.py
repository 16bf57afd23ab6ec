"""FastEncoder: texts in, embeddings out. It puts the steps together; the mathematics is elsewhere.

tokenization -> packing -> backbone -> output, each a module of its own; `pipeline` runs them in step over a corpus.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jv5kernels.backbone import PackedBackbone
from jv5kernels.backbones import CheckpointBackbones
from jv5kernels.calibration import Calibration, calibrate, open_calibration
from jv5kernels.call_arguments import check_length, dim_of, limits_of, output_of, with_prompt
from jv5kernels.checkpoint import Checkpoint, open_checkpoint
from jv5kernels.chunks import encode_chunks
from jv5kernels.device import resolve_device, resolve_dtype
from jv5kernels.graphs import ShortInputs
from jv5kernels.live.model import LiveModel, open_live
from jv5kernels.memory import MemoryModel, memory_model
from jv5kernels.output import (
    OutputFormat,
    check_dim,
    check_pooling,
    check_precision,
    embed_batch,
    embed_batch_tokens,
)
from jv5kernels.packing import PackedBatch
from jv5kernels.pipeline import INLINE_CHARACTERS, Limits, Pipeline, Statistics, progress_bar
from jv5kernels.storage import layout_of
from jv5kernels.tasks import check_task, tasks_of
from jv5kernels.tokenization import Tokenization, check_texts, resolve_prompt
from jv5kernels.warmup import WarmupReport, warm_lengths, warm_up

# From a batch to its values and the flags of rows that are not finite.
Step = Callable[[PackedBackbone, PackedBatch], tuple[Any, Tensor]]


class FastEncoder:
    """Encodes texts with a jina-embeddings-v5-text checkpoint, or any Qwen3 or EuroBERT embedding checkpoint.

    Args:
        model: "jv5-tiny" for the model that comes with the package, a hub id, a folder with the checkpoint's files, or
            a live model: a SentenceTransformer, the v5 remote class, a PeftModel, a Qwen3Model or EuroBertModel. A
            live model's weights are copied as they are now; `patch` speeds it up without a copy.
        task: adapter to use when a call names none (base repositories: "retrieval", "text-matching", "clustering",
            "classification"); the call must name one if it is None.
        tokenizer: for a live model that carries none: a fast tokenizer, or the path of a tokenizer.json.
        revision, token, cache_dir, local_files_only: as in huggingface_hub; every file comes from the same revision.
        device: default "cuda" where there is one, otherwise "cpu"; a live model's own.
        dtype: compute dtype; default bfloat16 on CUDA, float32 on the CPU; a live model's own.
        attention: implementation of `ops.attention_varlen`: "auto", "gluon", "triton", "sdpa", "flash_attn" or "torch".
        max_seq_length: tokens a text, special tokens included; default the checkpoint's, at most its positions.
        pooling: "lasttoken", "mean" or "cls"; default what the checkpoint states.
        prompts: name -> text put before every input; default the checkpoint's.
        truncate_dim: dimensions kept, before normalisation; default all.
        precision, calibration, profile: defaults of `encode`.
        batch_invariant: bit-identical embeddings of a text whatever else is in the call. On CUDA this swaps the
            library's matrix products for a fixed-configuration kernel; on a CPU every text runs alone.
        token_budget: tokens a batch; default what fits into the free memory, at most 32768 on CUDA (65536 for
            models as small as nano) and 4096 on a CPU.
        on_overlong: "truncate", or "error" to refuse texts longer than max_seq_length.

    Raises:
        FileNotFoundError: a file of the checkpoint is missing; the message names it.
        TypeError, ValueError: an argument, or something in the checkpoint, that is not supported; named in the message.

    Example:
        >>> encoder = FastEncoder("jv5-tiny", task="retrieval")
        >>> encoder.encode(["what is a kernel?"], prompt_name="query").shape
        (1, 384)
    """

    def __init__(
        self,
        model: str | Path | torch.nn.Module,
        *,
        task: str | None = None,
        tokenizer: Any = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        attention: str = "auto",
        max_seq_length: int | None = None,
        pooling: str | None = None,
        prompts: Mapping[str, str] | None = None,
        truncate_dim: int | None = None,
        precision: str = "float32",
        calibration: Calibration | str | Path | None = None,
        profile: str | None = None,
        batch_invariant: bool = False,
        token_budget: int | None = None,
        on_overlong: str = "truncate",
    ) -> None:
        if on_overlong not in ("truncate", "error"):
            raise ValueError(f"on_overlong={on_overlong!r}: choose 'truncate' or 'error'")
        self.checkpoint: Checkpoint | LiveModel
        if isinstance(model, torch.nn.Module):
            self.checkpoint = open_live(model, tokenizer=tokenizer)
            device = self.checkpoint.device if device is None else device
            dtype = self.checkpoint.torch_dtype if dtype is None else dtype
            task = self.checkpoint.default_task if task is None else task
        elif tokenizer is not None:
            raise ValueError("tokenizer= is for live models: a checkpoint brings its own")
        else:
            self.checkpoint = open_checkpoint(
                model,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.spec = self.checkpoint.spec
        self.tasks = self.checkpoint.tasks
        self.task = check_task(task, self.tasks) if task is not None else None
        self.pooling = check_pooling(pooling or self.checkpoint.pooling)
        self.prompts = dict(self.checkpoint.prompts if prompts is None else prompts)
        self.truncate_dim = truncate_dim
        dim = dim_of(self, truncate_dim)
        self.precision = check_precision(precision)
        self.calibration = None if calibration is None else open_calibration(calibration)
        self.profile = profile
        if profile is not None:
            layout_of(profile, precision, dim)
        self.batch_invariant = batch_invariant
        self.on_overlong = on_overlong
        self.max_seq_length = check_length(self, "max_seq_length", max_seq_length)
        self.token_budget = token_budget
        self.statistics = Statistics()
        self._short = ShortInputs(self.device) if self.device.type == "cuda" else None
        self._fingerprints: dict[str | None, str] = {}
        self._tokenization = Tokenization(self.checkpoint.tokenizer(), self.max_seq_length)
        self._backbones = CheckpointBackbones(
            self.checkpoint,
            device=self.device,
            dtype=self.dtype,
            attention=attention,
            batch_invariant=batch_invariant,
        )
        if self.task is not None or not self.tasks:
            self._backbones.get(self.task)

    # Functions of modules of their own, whose first argument is the encoder.
    calibrate = calibrate
    encode_chunks = encode_chunks

    # What code written for Sentence Transformers reaches for.

    def encode(
        self,
        inputs: str | Sequence[str],
        *,
        task: str | Sequence[str] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        output_value: str = "sentence_embedding",
        precision: str | None = None,
        ranges: np.ndarray | Tensor | str | None = None,
        calibration: Calibration | str | Path | None = None,
        profile: str | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
        max_length: int | None = None,
    ) -> Any:
        """Returns the embeddings of one text or of a sequence of texts, in the order given.

        Args:
            inputs: one str, or a sequence of them. An empty or blank text gives the embedding of the bare prompt.
            task: adapter, or one adapter a text; default the encoder's.
            prompt_name: name of the prompt put before each text; default the checkpoint's default prompt.
            prompt: the prompt itself; wins over `prompt_name`.
            batch_size: most texts a batch; default none, the token budget decides.
            show_progress_bar: show one on stderr.
            output_value: "sentence_embedding", or "token_embeddings" for every token's final hidden state.
            precision: "float32", "float16", "bfloat16", "int8", "uint8", "binary" or "ubinary".
            ranges: for int8 and uint8 in place of a calibration: (2, dim) minima and maxima, not checked against
                anything; or "batch" for those of this call's own embeddings, as Sentence Transformers takes them.
            calibration: for int8 and uint8: what `calibrate` returned, or its file; default the encoder's. It has to
                fit model, task, prompt and dimension; one of documents also serves queries.
            profile: the vector store that the result is for, one of `storage.PROFILES`: it decides dtype, order of bits
                and signedness; default the encoder's, or else Sentence Transformers' bytes.
            convert_to_numpy: return numpy arrays (bfloat16: torch tensors).
            convert_to_tensor: return a torch tensor on the encoder's device; wins over `convert_to_numpy`.
            normalize_embeddings: unit length (after slicing).
            truncate_dim: dimensions kept; default the encoder's.
            max_length: tokens a text in this call, at most max_seq_length.

        Returns:
            (N, dim) array, or (dim,) for a single str; int8 codes (N, dim), packed bits (N, ⌈dim/8⌉). A list of (dim,)
            tensors when both conversions are off. For "token_embeddings" a list of (tokens, C) tensors.

        Raises:
            TypeError: an input that is not a str (its position and type are named; nothing is encoded).
            ValueError: an unknown task, prompt, precision or dimension (the valid ones are listed); a text longer
                than the limit with on_overlong="error".
            torch.OutOfMemoryError: a single text does not fit into memory.
            FloatingPointError: an embedding is not finite, also in fp32.

        Example:
            >>> encoder.encode(["first", "second"], task="retrieval", truncate_dim=256, precision="binary").shape
            (2, 32)
        """
        single = isinstance(inputs, str)
        texts = check_texts([inputs] if isinstance(inputs, str) else inputs)
        tasks = tasks_of(task, self.task, self.tasks, len(texts))
        prefix = self._prefix(prompt_name, prompt)
        texts = [prefix + text for text in texts]
        limits = limits_of(self, batch_size, max_length, sum(map(len, texts)))
        run = partial(self._run, texts, tasks, limits, show_progress_bar=bool(show_progress_bar))
        if output_value == "token_embeddings":
            tokens: dict[int, Tensor] = {}
            run(
                embed_batch_tokens,
                lambda rows, found: tokens.update(zip(rows, found, strict=True)),
                keep_on_device=True,
            )
            return tokens[0] if single else [tokens[i] for i in range(len(texts))]
        if output_value != "sentence_embedding":
            raise ValueError(
                f"output_value={output_value!r}: choose 'sentence_embedding' or 'token_embeddings'"
            )
        output = output_of(
            self,
            tasks=tasks or [task if isinstance(task, str) else self.task],
            prompt=prefix,
            precision=precision,
            ranges=ranges,
            calibration=calibration,
            profile=profile,
            normalize=normalize_embeddings,
            truncate_dim=truncate_dim,
        )
        # Ranges of the call itself are taken on the device, so that bytes alone leave it.
        stay = convert_to_tensor or output.over_call
        device = self.device if stay else torch.device("cpu")
        result = torch.empty(len(texts), output.width, dtype=output.dtype, device=device)

        def store(rows: np.ndarray, values: Tensor) -> None:
            result[torch.from_numpy(rows).to(device)] = values

        run(partial(embed_batch, output), store, keep_on_device=stay, output=output)
        result = output.finish(result)
        if convert_to_tensor:
            return result[0] if single else result
        result = result.cpu()
        if convert_to_numpy and result.dtype != torch.bfloat16:
            return result[0].numpy() if single else result.numpy()
        if convert_to_numpy:
            return result[0] if single else result
        return result[0] if single else list(result)

    def encode_query(self, inputs: str | Sequence[str], **options: Any) -> Any:
        """`encode` with the prompt "query", when there is one and no other is asked for."""
        return self.encode(inputs, **with_prompt(self.prompts, ("query",), options))

    def encode_document(self, inputs: str | Sequence[str], **options: Any) -> Any:
        """`encode` with the prompt "document" (or "passage", "corpus"), when there is one and no other is asked for."""
        names = ("document", "passage", "corpus")
        return self.encode(inputs, **with_prompt(self.prompts, names, options))

    def similarity(self, a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> Tensor:
        """Returns cosine similarities, (N, M) float32, of embeddings (N, dim) and (M, dim)."""
        x, y = (
            torch.nn.functional.normalize(torch.as_tensor(e).float().view(-1, e.shape[-1]), dim=-1)
            for e in (a, b)
        )
        return x @ y.to(x.device).T

    def tokenize(self, texts: Sequence[str], prompt: str = "") -> list[np.ndarray]:
        """Returns the token ids that `encode` would use, one int32 array a text; no prompt unless given."""
        return list(self._tokenization.encode([prompt + text for text in check_texts(texts)]).ids)

    def get_sentence_embedding_dimension(self) -> int:
        """Dimensions of an embedding (before bits are packed)."""
        return check_dim(self.truncate_dim, self.spec.hidden_size)

    def memory_model(self) -> MemoryModel:
        """Bytes = weights + fixed + per_token · tokens, an upper bound for this model and dtype."""
        return memory_model(self.spec, self.dtype)

    def warmup(
        self,
        tasks: Sequence[str] | None = None,
        *,
        precision: str | None = None,
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
        ranges: np.ndarray | Tensor | str | None = None,
        calibration: Calibration | str | Path | None = None,
        profile: str | None = None,
    ) -> WarmupReport:
        """Does what first calls would otherwise wait for: loads, compiles, and records CUDA graphs for short inputs.

        Kernels that an earlier process compiled come from Triton's cache on disk (TRITON_CACHE_DIR).

        Args:
            tasks: adapters to be ready for; default the encoder's own, or all when it has none.
            precision, normalize_embeddings, truncate_dim, ranges, calibration, profile: as in `encode`; call again for
                each form of output that is to be ready.

        Example:
            >>> encoder.warmup(precision="binary").recordings    # on a GPU
            17
        """
        names = [self.task] if self.task is not None or not self.tasks else list(self.tasks)
        if tasks is not None:
            names = [check_task(task, self.tasks) for task in tasks]
        output = output_of(
            self,
            tasks=names,
            prompt=self._prefix(None, None),
            precision=precision,
            ranges=ranges,
            calibration=calibration,
            profile=profile,
            normalize=normalize_embeddings,
            truncate_dim=truncate_dim,
        )
        backbones = [self._backbones.get(name) for name in names]
        budget = limits_of(self, None, None, INLINE_CHARACTERS + 1).token_budget
        lengths = warm_lengths(min(self.max_seq_length, budget), budget)
        return warm_up(backbones, output, lengths, self._short)

    def _prefix(self, prompt_name: str | None, prompt: str | None) -> str:
        default = self.checkpoint.default_prompt_name
        return resolve_prompt(self.prompts, default, prompt_name, prompt)

    # Runs.

    def _run(
        self,
        texts: Sequence[str],
        tasks: Sequence[str | None],
        limits: Limits,
        step: Step,
        store: Callable[[np.ndarray, Any], None],
        *,
        show_progress_bar: bool,
        keep_on_device: bool,
        output: OutputFormat | None = None,
    ) -> None:
        """Runs the texts of every task in turn through `step`; warns once about texts that were cut.

        Args:
            output: what `step` computes, if short inputs may take a recording of it.
        """
        truncated = 0
        with torch.inference_mode(), progress_bar(len(texts), show_progress_bar) as progress:
            for task in dict.fromkeys(tasks):
                rows = np.flatnonzero([t == task for t in tasks])
                backbone = self._backbones.get(task)
                short = None
                if self._short is not None and output is not None:
                    short = partial(
                        self._short.run, backbone, output, keep_on_device=keep_on_device
                    )
                pipeline = Pipeline(
                    self._tokenization,
                    self.device,
                    partial(step, backbone),
                    partial(self._step_in_float32, step, task),
                    store,
                    limits=limits,
                    statistics=self.statistics,
                    short=short,
                    keep_on_device=keep_on_device,
                    progress=progress,
                )
                truncated += pipeline.run([texts[int(row)] for row in rows], rows)
        if truncated:
            warnings.warn(
                f"{truncated} of {len(texts)} texts were longer than {limits.max_length} tokens and were cut",
                stacklevel=4,
            )

    def _step_in_float32(
        self, step: Step, task: str | None, batch: PackedBatch
    ) -> tuple[Any, Tensor]:
        return step(self._backbones.in_float32(task), batch)
