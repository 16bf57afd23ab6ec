"""A whole training run: corpus and teacher in, a checkpoint in the base repositories' layout out."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from jv5kernels.synthetic.tokenizer import train_tokenizer
from jv5kernels.training.batches import Batches, Source, grouped
from jv5kernels.training.corpus import Package, Texts, build_texts
from jv5kernels.training.long_texts import DOCUMENT, Chapter, build_passages
from jv5kernels.training.objective import Objective
from jv5kernels.training.recipe import Recipe, Stage
from jv5kernels.training.rotation import rotate_model
from jv5kernels.training.scores import ndcg_at
from jv5kernels.training.stages import moved, run_stage, seconds_a_step
from jv5kernels.training.student import (
    adapter_tensors,
    embed,
    new_backbone,
    read_backbone,
    set_rope_theta,
    set_token_embeddings,
    with_adapter,
    write_adapter,
    write_base,
)
from jv5kernels.training.teacher import embed_with_teacher, mine_neighbours

__all__ = ["Run", "tokenizer_for"]

NEIGHBOURS = 24
# What ψ of a finished backbone is fitted to, and how long.
FITTED_TEXTS, FITTING_STEPS = 20_000, 300
VOCAB_MULTIPLE = 64
# What optimiser and logging add to forward and backward, and what begins and ends a stage.
STEP_OVERHEAD, STAGE_OVERHEAD = 1.5, 2.5
BATCHES = {
    "distillation": "pairs",
    "text-matching": "pairs",
    "retrieval": "pairs",
    "clustering": "topics",
    "classification": "classes",
}


def tokenizer_for(packages: Sequence[Package], vocab_size: int) -> Tokenizer:
    """Returns a byte-level BPE tokenizer of the texts of the split "train", in all languages."""
    texts = (
        text
        for package in packages
        if package.split == "train"
        for texts in (package.synopsis, package.description)
        for text in texts.values()
    )
    return train_tokenizer("small", texts, vocab_size=vocab_size)


@dataclass
class Run:
    """A training run in a folder: each step keeps its result there, and a repeated call goes on behind the last one.

    Args:
        folder: for the tokenizer, the teacher's embeddings, checkpoints, the log and the finished model.
        packages: the corpus; only the split "train" is learnt from, "dev" is watched.
        teacher: folder or hub id of a Sentence Transformers model.
        recipe: sizes, stages and seed.
        device: "cuda" or "cpu".
        progress: show progress bars.
        tell: is told what happens next.
        documentation: chapters for long texts; only those of the split "train" are learnt from.
    """

    folder: Path
    packages: Sequence[Package]
    teacher: str | Path
    recipe: Recipe
    device: str
    progress: bool = True
    tell: Callable[[str], object] = print
    documentation: Sequence[Chapter] = ()

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.started = time.perf_counter()
        self.log: dict[str, Any] = {
            "recipe": asdict(self.recipe),
            "history": {},
            "dev": {},
            "seconds": {},
        }

    @property
    def trained(self) -> Path:
        """Where the model is as it was trained, whose adapters those of an ablation are held against."""
        return self.folder / "trained"

    @property
    def model(self) -> Path:
        """Where the finished model is."""
        return self.folder / "model"

    def finish(self) -> Path:
        """Writes the finished model: the trained one, turned by the recipe's angle."""
        rotate_model(self.trained, self.model, self.recipe.rotation)
        self.tell(f"the model is in {self.model}")
        return self.model

    def prepare(self) -> None:
        """Trains the tokenizer, tokenises the corpus, embeds it with the teacher and mines hard negatives."""
        self.tokenizer = self._tokenizer()
        train = [package for package in self.packages if package.split == "train"]
        dev = [package for package in self.packages if package.split == "dev"]
        if not train or not dev:
            raise ValueError(
                f"the corpus has {len(train)} packages to train on and {len(dev)} to watch"
            )
        texts = build_texts(train, self.tokenizer)
        self.dev = build_texts(dev, self.tokenizer)
        self._timed("tokenised")
        targets = embed_with_teacher(
            self.teacher, texts.english_texts, device=self.device, cache=self.folder
        )
        self._timed("teacher")
        source = Source(texts, targets)
        queries = source.rows["query", True].first()
        neighbours = mine_neighbours(
            targets[texts.target[queries]],
            targets[source.document_targets],
            source.document_targets,
            count=NEIGHBOURS,
            device=self.device,
        )
        self.source = replace(source, neighbours=neighbours, **self._documentation()).warm_up()
        self.ids = torch.from_numpy(texts.ids.astype(np.int32)).to(self.device)
        self.targets = torch.from_numpy(targets).to(self.device)
        self._timed("mined")

    def _documentation(self) -> dict[str, Any]:
        """What a `Source` needs for long texts."""
        found: dict[str, Any] = {
            "prompt": len(self.tokenizer.encode(DOCUMENT).ids),
            "newline": np.asarray(self.tokenizer.encode("\n").ids, dtype=np.uint16),
        }
        chapters = [chapter for chapter in self.documentation if chapter.split == "train"]
        if chapters:
            passages = build_passages(chapters, self.tokenizer)
            found["passages"] = passages
            found["passage_targets"] = embed_with_teacher(
                self.teacher, passages.english_texts, device=self.device, cache=self.folder
            )
            self._timed(
                f"{len(passages.starts) - 1} chapters of {len(passages.offsets) - 1} passages"
            )
        return found

    def pace(self, seconds: float, longest: float = 1.5) -> float:
        """Scales the steps of all stages so that the model is done about so many seconds after the run's start.

        Measured on a few steps of each stage; the factor, at most `longest`, is kept for a resumed run.
        """
        kept = self.folder / "pace.json"
        if kept.is_file():
            factor = float(json.loads(kept.read_text("utf-8"))["factor"])
        else:
            needed = sum(self._predicted().values()) * STEP_OVERHEAD
            left = seconds - (time.perf_counter() - self.started) - STAGE_OVERHEAD * 5
            factor = min(longest, max(left, 0.0) / needed)
            kept.write_text(json.dumps({"factor": factor}), "utf-8")
        self.recipe = self.recipe.scaled(factor)
        self.log |= {"pace": factor, "recipe": asdict(self.recipe)}
        self._timed(f"steps times {factor:.2f}")
        return factor

    def _predicted(self) -> dict[str, float]:
        """Seconds of every stage."""
        rng = torch.get_rng_state()
        rows = self._embedding_rows()
        seconds = {}
        for task, stage in {
            "distillation": self.recipe.distillation,
            **self.recipe.adapters,
        }.items():
            backbone = new_backbone(self.recipe, rows)
            if task != "distillation":
                backbone = with_adapter(backbone, task, self.recipe.lora_rank)
            projection = nn.Linear(self.recipe.geometry["hidden_size"], self.targets.shape[1])
            objective = self._objective(backbone, stage, projection)
            batches = Batches(self.source, stage, BATCHES[task], self.recipe.seed)
            step, tokens = seconds_a_step(objective, batches)
            seconds[task] = step * stage.steps
            self.tell(
                f"{task}: {1000 * step:.1f} ms and {tokens / 1000:.0f} thousand tokens a step "
                f"({tokens / step / 1e6:.2f} million a second), {seconds[task]:.1f} s"
            )
        torch.set_rng_state(rng)
        return seconds

    def _embedding_rows(self) -> int:
        return -(-self.tokenizer.get_vocab_size() // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def distil(self) -> nn.Module:
        """Returns the backbone after stage 1."""
        torch.manual_seed(self.recipe.seed)
        self.backbone = new_backbone(self.recipe, self._embedding_rows())
        if self.recipe.teacher_tokens:
            set_token_embeddings(self.backbone, self._token_vectors())
        self.projection = nn.Linear(self.backbone.config.hidden_size, self.source.targets.shape[1])  # type: ignore
        objective = self._objective(self.backbone, self.recipe.distillation)
        self._train("distillation", objective, self.recipe.seed)
        write_base(
            self.trained, self.recipe, self.backbone, self.tokenizer, list(self.recipe.adapters)
        )
        return self.backbone

    def take_tokenizer(self, model: Path) -> None:
        """Has `prepare` use the tokenizer of a finished model."""
        shutil.copyfile(model / "tokenizer.json", self.folder / "tokenizer.json")

    def steps_within(self, stage: Stage, seconds: float) -> int:
        """How many steps of a retrieval stage, at most its own, end within so many seconds with what ends a stage."""
        rng = torch.get_rng_state()
        backbone = with_adapter(copy.deepcopy(self.backbone), "retrieval", self.recipe.lora_rank)
        batches = Batches(self.source, stage, BATCHES["retrieval"], self.recipe.seed)
        step, _ = seconds_a_step(self._objective(backbone, stage), batches)
        torch.set_rng_state(rng)
        steps = int((seconds - STAGE_OVERHEAD) / (STEP_OVERHEAD * step))
        self.tell(f"{1000 * step:.1f} ms a step of {stage.batch}: {steps} steps in {seconds:.1f} s")
        return max(2, min(stage.steps, steps))

    def use(self, model: Path) -> None:
        """Takes the backbone of a finished model, with a projection ψ fitted to it, in place of `distil`."""
        self.backbone = read_backbone(self.recipe, model).to(self.device)
        texts, rng = self.source.texts, np.random.default_rng(self.recipe.seed)
        rows = np.flatnonzero(texts.english)
        rows = rng.permutation(rows)[:FITTED_TEXTS]
        self.backbone.eval()
        embeddings = torch.from_numpy(self._unit(self.backbone, texts, rows)).to(self.device)
        targets = self.targets[torch.from_numpy(texts.target[rows].astype(np.int64))]
        torch.manual_seed(self.recipe.seed)
        projection = nn.Linear(embeddings.shape[1], targets.shape[1]).to(self.device)
        fit = torch.optim.Adam(projection.parameters(), lr=1e-2)
        objective = self._objective(self.backbone, self.recipe.distillation, projection)
        for _ in range(FITTING_STEPS):
            loss = objective.distillation(embeddings, targets)
            fit.zero_grad()
            loss.backward()
            fit.step()
        self.projection = projection
        self._timed(f"projection fitted to a loss of {loss.item():.3f}")

    def _token_vectors(self) -> Tensor:
        """The teacher's embedding of each token's text: where a pre-trained table would be."""
        tokens = range(self.tokenizer.get_vocab_size())
        texts = self.tokenizer.decode_batch(
            [[token] for token in tokens], skip_special_tokens=False
        )
        vectors = embed_with_teacher(self.teacher, texts, device=self.device, cache=self.folder)
        return torch.from_numpy(vectors.astype(np.float32))

    def adapt(
        self,
        task: str,
        *,
        stage: Stage | None = None,
        seed: int | None = None,
        name: str | None = None,
    ) -> dict[str, Tensor]:
        """Trains one task's adapter on the frozen backbone and returns its tensors; the backbone stays as it was.

        Args:
            stage: in place of the recipe's, with `name` for its folder and log.
        """
        seed = self.recipe.seed if seed is None else seed
        torch.manual_seed(seed)
        stage = stage or self.recipe.adapters[task]
        self.backbone.requires_grad_(False)
        adapted = with_adapter(self.backbone, task, self.recipe.lora_rank)
        projection = nn.Linear(self.projection.in_features, self.projection.out_features)
        projection.load_state_dict(self.projection.state_dict())
        objective = self._objective(adapted, stage, projection)
        self._train(name or task, objective, seed, BATCHES[task])
        tensors = adapter_tensors(adapted, stage.share)
        adapted.unload()
        return tensors

    def write(self, task: str, tensors: dict[str, Tensor]) -> None:
        """Adds an adapter to the trained model's folder."""
        write_adapter(self.trained, task, tensors)

    def save_log(self) -> Path:
        """Writes log.json: recipe, losses by step, dev scores, seconds."""
        path = self.folder / "log.json"
        path.write_text(json.dumps(self.log, indent=1) + "\n", "utf-8")
        return path

    def _tokenizer(self) -> Tokenizer:
        kept = self.folder / "tokenizer.json"
        if not kept.is_file():
            self.tell("training the tokenizer")
            fresh = kept.with_suffix(".part")
            tokenizer_for(self.packages, self.recipe.vocab_size).save(str(fresh), pretty=False)
            fresh.replace(kept)
        return Tokenizer.from_file(str(kept))

    def _objective(
        self, backbone: nn.Module, stage: Stage, projection: nn.Linear | None = None
    ) -> Objective:
        dims = [dim for dim in self.recipe.matryoshka_dims]
        projection = projection or self.projection
        return Objective(backbone, stage, dims, projection, self.ids, self.targets).to(self.device)

    def _train(self, name: str, objective: Objective, seed: int, kind: str = "pairs") -> None:
        stage = objective.stage
        self.tell(f"{name}: {stage.steps} steps of {stage.batch}")
        set_rope_theta(self.backbone, stage.rope_theta)
        objective.train()
        history = run_stage(
            objective,
            Batches(self.source, stage, kind, seed),
            self.folder / "checkpoints" / name,
            seed=seed,
            device=self.device,
            progress=self.progress,
        )
        trained, _ = self.dev_scores(objective.backbone)
        set_rope_theta(self.backbone, self.recipe.inference_theta)
        scores, binary = self.dev_scores(objective.backbone)
        self.log["history"][name] = history
        self.log["dev"][name] = {
            "ndcg@10": scores,
            "ndcg@10 at the base in training": trained,
            "ndcg@10 binary": binary,
        }
        self._timed(name)
        self.tell(
            f"{name}: dev nDCG@10 {scores:.4f} ({trained:.4f} at the RoPE base in training, "
            f"{binary:.4f} binary)"
        )

    def dev_scores(self, backbone: nn.Module) -> tuple[float, float]:
        """nDCG@10 of English synopses against all English descriptions of the split "dev": of floats, and of signs."""
        backbone.eval()
        pair = [
            self._unit(backbone, self.dev, self.dev.by_package(kind, english=True).first())
            for kind in ("query", "description")
        ]
        scores = []
        for queries, documents in (pair, [(x > 0) * np.float32(2) - 1 for x in pair]):
            scores.append(float(ndcg_at(queries @ documents.T, np.arange(len(queries))).mean()))
        return scores[0], scores[1]

    def _unit(self, backbone: nn.Module, texts: Texts, rows: np.ndarray) -> np.ndarray:
        """Unit embeddings of some texts."""
        ids = torch.from_numpy(texts.ids.astype(np.int32)).to(self.device)
        out = []
        for start in range(0, len(rows), 1024):
            parts = moved(grouped(texts, rows[start : start + 1024], 256), self.device)
            with (
                torch.no_grad(),
                torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.device == "cuda"),
            ):
                out.append(nn.functional.normalize(embed(backbone, ids, parts), dim=-1).cpu())
        return torch.cat(out).numpy()

    def _timed(self, what: str) -> None:
        self.log["seconds"][what] = round(time.perf_counter() - self.started, 1)
        self.tell(f"{what} after {self.log['seconds'][what]} s")
