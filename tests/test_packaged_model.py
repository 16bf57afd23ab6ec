"""jv5-tiny, the model in the package: found by its name, laid out as the base repositories, exact, trained."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from live_models import RemoteLike
from safetensors import safe_open

from jv5kernels import FastEncoder, verify
from jv5kernels.checkpoint import open_checkpoint
from jv5kernels.cli import main
from jv5kernels.comparison.peers import merged_reference, sentence_transformers_peer
from jv5kernels.packaged import PACKAGED, packaged_folder
from jv5kernels.synthetic.checkpoint import TASKS, write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = packaged_folder()
MOST_BYTES = 16 * 2**20

# What each text is about, then the text itself, then a question that it answers.
TOPICS = {
    "archive": (
        "This program packs files and folders into one archive, compresses it, and unpacks it again. "
        "It reads zip, tar, gzip and bzip2 files.",
        "compress files into an archive",
    ),
    "mail": (
        "A mail reader for the terminal. It shows threads of messages, talks to IMAP servers and "
        "signs e-mail with OpenPGP.",
        "read my e-mail in a terminal",
    ),
    "chess": (
        "Play chess against the computer or against a friend. Games can be saved, and the strength "
        "of the computer's player can be chosen.",
        "play chess against the computer",
    ),
    "photos": (
        "An image viewer and editor for photographs: it crops, rotates, corrects colours and sorts "
        "pictures from digital cameras into albums.",
        "view and edit photos from a digital camera",
    ),
    "music": (
        "A music player that manages a collection of songs, plays MP3, Ogg Vorbis and FLAC files, "
        "and fetches covers and lyrics.",
        "listen to MP3 songs",
    ),
    "database": (
        "An object-relational SQL database server. It supports transactions, foreign keys, "
        "subqueries, triggers and user-defined types.",
        "SQL database server with transactions",
    ),
    "compiler": (
        "A compiler for the C and C++ programming languages that produces machine code for many "
        "processors and optimises it.",
        "compile C++ source code",
    ),
    "backup": (
        "Makes incremental backups of a hard disk to another computer over the network, and "
        "restores files as they were on any day.",
        "back up my hard disk over the network",
    ),
    "font": (
        "TrueType fonts for writing Arabic and Persian texts, with serif and sans-serif letters.",
        "fonts for the Arabic script",
    ),
    "fractions": (
        "A library of arbitrary precision arithmetic on integers, rational numbers and "
        "floating-point numbers.",
        "calculate with very large integers",
    ),
}
DOCUMENTS = [text for text, _ in TOPICS.values()]
QUERIES = [question for _, question in TOPICS.values()]
FOREIGN = {
    "archive": "Dateien in ein Archiv komprimieren",
    "chess": "jouer aux échecs contre l'ordinateur",
    "music": "Musik-Player für MP3-Dateien",
    "database": "serveur de bases de données SQL",
    "compiler": "compilatore per il linguaggio C++",
}


@pytest.fixture(scope="module")
def encoder() -> FastEncoder:
    return FastEncoder(PACKAGED, device="cpu", task="retrieval")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the hub is asked for a packaged model")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


# The name.


def test_the_name_is_the_packaged_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = open_checkpoint(PACKAGED, local_files_only=True)
    assert checkpoint.folder == FOLDER
    assert checkpoint.source == open_checkpoint(FOLDER).source == PACKAGED
    assert checkpoint.revision is None


@pytest.mark.parametrize(
    "options", [{"revision": "main"}, {"token": "secret"}, {"cache_dir": "somewhere"}]
)
def test_options_of_a_hub_are_refused(options: dict[str, str]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}.* is for hub ids, but jv5-tiny comes") as refusal:
        FastEncoder(PACKAGED, **options)
    assert "secret" not in str(refusal.value)


def test_a_local_folder_of_that_name_is_neither_taken_nor_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / PACKAGED, family="nano")
    with pytest.raises(ValueError, match=r"also a folder .*write \./jv5-tiny for the folder"):
        FastEncoder(PACKAGED, device="cpu")
    for path in (f"./{PACKAGED}", Path(PACKAGED), str(tmp_path / PACKAGED)):
        assert open_checkpoint(path).spec.model_type == "eurobert"
    assert open_checkpoint(FOLDER).source == PACKAGED  # what the commands take by default
    monkeypatch.chdir(FOLDER.parent)
    assert open_checkpoint(PACKAGED).folder == FOLDER  # here the two are one


def test_a_path_is_never_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (f"./{PACKAGED}", Path(PACKAGED)):
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            open_checkpoint(path)


@pytest.mark.parametrize(
    "words",
    [
        ["encode", "texts.txt", "-o", "out.npy", "--model", PACKAGED, "--task", "clustering"],
        ["calibrate", "texts.txt", "-o", "ranges.json", "--model", PACKAGED, "--task", "retrieval"],
        ["info", "--model", PACKAGED],
        ["report", "texts.txt", "-o", "kept.png", "--dims", "384"],
    ],
    ids=lambda words: words[0],
)
def test_commands_take_the_name(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("\n".join([*DOCUMENTS, *QUERIES]))
    assert main([*words, "--device", "cpu"]) == 0, capsys.readouterr().err
    if words[0] == "encode":
        assert np.load("out.npy").shape == (20, 384)
    if words[0] == "calibrate":
        assert f'"{PACKAGED}"' in Path("ranges.json").read_text()
    if words[0] in ("info", "report"):
        assert PACKAGED in capsys.readouterr().out


# The files.


def paths_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_layout_is_that_of_a_base_repository(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", family="small")
    assert paths_in(FOLDER) == paths_in(base) | {"README.md"}
    for name in ("modules.json", "config_sentence_transformers.json", "tokenizer_config.json"):
        assert json.loads((FOLDER / name).read_text()) == json.loads((base / name).read_text())
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (FOLDER, base))
    assert theirs.keys() <= ours.keys()
    for task in TASKS:
        name = f"adapters/{task}/adapter_config.json"
        ours, theirs = (json.loads((f / name).read_text()) for f in (FOLDER, base))
        assert ours.keys() == theirs.keys()


def test_size_dtype_and_shape() -> None:
    assert sum((FOLDER / name).stat().st_size for name in paths_in(FOLDER)) <= MOST_BYTES
    for path in FOLDER.rglob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}
    checkpoint = open_checkpoint(FOLDER)
    spec = checkpoint.spec
    assert 3e6 <= sum(tensor.numel() for tensor in checkpoint.weights().values()) <= 8e6
    assert spec.model_type == "qwen3" and spec.qk_norm and spec.head_dim in (64, 128)
    assert spec.num_kv_heads < spec.num_heads
    assert checkpoint.max_seq_length >= 8192
    assert set(checkpoint.tasks) == set(TASKS) and checkpoint.pooling == "lasttoken"
    dims = checkpoint.matryoshka_dims
    assert max(dims) == spec.hidden_size and len(dims) > 2


def test_the_package_data_of_the_wheel_holds_every_file() -> None:
    pyproject = (FOLDER.parents[2] / "pyproject.toml").read_text()
    (patterns,) = re.findall(r"^jv5kernels = \[(.*)\]$", pyproject, flags=re.M)
    package = FOLDER.parents[1]
    held = {path for pattern in re.findall(r'"(.*?)"', patterns) for path in package.glob(pattern)}
    assert {path for path in FOLDER.rglob("*") if path.is_file()} <= held


# The embeddings are those of Transformers.


def test_parity_with_transformers_for_all_tasks() -> None:
    report = verify(PACKAGED, device="cpu", lengths=(16, 128))
    assert {row.task for row in report.rows} == set(TASKS)
    assert report.passed and min(row.cosine_min for row in report.rows) >= 0.999999, str(report)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (x.astype(np.float64) for x in (a, b))
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.fixture(scope="module")
def remote() -> RemoteLike:
    """As the class loads the real base repositories: PEFT's adapters over Transformers' backbone."""
    return RemoteLike.load(FOLDER)


@pytest.mark.parametrize("task", TASKS)
def test_code_for_the_base_repositories_loads_it(
    encoder: FastEncoder, remote: RemoteLike, task: str
) -> None:
    for prompt in ("query", "document"):
        theirs = remote.encode(DOCUMENTS, task, prompt).numpy()
        ours = encoder.encode(DOCUMENTS, task=task, prompt_name=prompt)
        assert cosines(ours, theirs).min() >= 0.999999


def test_the_live_model_gives_the_same(encoder: FastEncoder, remote: RemoteLike) -> None:
    live = FastEncoder(remote)
    for task in TASKS:
        ours = encoder.encode_document(DOCUMENTS[:3], task=task)
        assert cosines(ours, live.encode_document(DOCUMENTS[:3], task=task)).min() >= 0.999999


def test_sentence_transformers_with_a_merged_adapter(encoder: FastEncoder) -> None:
    with sentence_transformers_peer(encoder, merged_reference(encoder, "retrieval")) as peer:
        theirs = peer.encode([f"Document: {text}" for text in DOCUMENTS], prompt="")
    assert cosines(encoder.encode_document(DOCUMENTS), theirs).min() >= 0.999999


def test_transformers_own_tokenizer_reads_the_files(encoder: FastEncoder) -> None:
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer.from_pretrained(FOLDER)
    texts = [*DOCUMENTS, *FOREIGN.values(), "メールを読む  \n\n x²"]
    for text, ids in zip(texts, encoder.tokenize(texts), strict=True):
        assert tokenizer(text)["input_ids"] == ids.tolist()


# It is trained.


def hits(queries: np.ndarray, documents: np.ndarray) -> list[bool]:
    return (np.argmax(queries @ documents.T, axis=1) == np.arange(len(queries))).tolist()


@pytest.mark.parametrize("dim", [384, 128, 64])
def test_a_question_finds_its_text(encoder: FastEncoder, dim: int) -> None:
    documents = encoder.encode_document(DOCUMENTS, truncate_dim=dim)
    found = hits(encoder.encode_query(QUERIES, truncate_dim=dim), documents)
    wrong = [topic for topic, hit in zip(TOPICS, found, strict=True) if not hit]
    assert len(wrong) <= 1, wrong


def test_bits_and_int8_find_it_too(encoder: FastEncoder) -> None:
    bits = [
        np.unpackbits(encode(texts, precision="ubinary"), axis=1) * 2.0 - 1
        for encode, texts in ((encoder.encode_query, QUERIES), (encoder.encode_document, DOCUMENTS))
    ]
    assert sum(hits(*bits)) >= 8
    codes = {
        "precision": "int8",
        "calibration": encoder.calibrate(DOCUMENTS, prompt_name="document", symmetric=True),
    }
    queries = encoder.encode_query(QUERIES, **codes).astype(np.float32)
    documents = encoder.encode_document(DOCUMENTS, **codes).astype(np.float32)
    assert sum(hits(queries, documents)) >= 9


def test_questions_in_other_languages_find_english_texts(encoder: FastEncoder) -> None:
    documents = encoder.encode_document(DOCUMENTS)
    best = np.argmax(encoder.encode_query(list(FOREIGN.values())) @ documents.T, axis=1)
    topics = list(TOPICS)
    right = [topics[i] == topic for i, topic in zip(best, FOREIGN, strict=True)]
    assert sum(right) >= 4, [topics[i] for i in best]


@pytest.fixture(scope="module")
def groups() -> list[list[str]]:
    return [
        ["a chess game", "a card game", "a puzzle game with levels", "an arcade space shooter"],
        ["a mail server", "an FTP server", "a DNS name server", "a web server"],
        ["French translation of the handbook", "German dictionary", "Polish spell checker words"],
    ]


@pytest.mark.parametrize("task", ["text-matching", "clustering", "classification"])
def test_texts_of_a_kind_lie_together(
    encoder: FastEncoder, task: str, groups: list[list[str]]
) -> None:
    embeddings = encoder.encode_document([text for group in groups for text in group], task=task)
    label = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    similar = embeddings @ embeddings.T
    same = label[:, None] == label[None, :]
    other = ~np.eye(len(label), dtype=bool)
    assert similar[same & other].mean() > similar[~same].mean() + 0.05


def test_the_adapters_differ(encoder: FastEncoder) -> None:
    by_task = [encoder.encode_document(DOCUMENTS, task=task) for task in TASKS]
    for i, a in enumerate(by_task):
        for b in by_task[:i]:
            assert cosines(a, b).mean() < 0.999


# The card.


@pytest.fixture
def card() -> str:
    return (FOLDER / "README.md").read_text("utf-8")


def test_the_card_is_one_that_the_hub_reads(card: str) -> None:
    data = huggingface_hub.ModelCard(card).data
    assert data.license == "apache-2.0" and data.pipeline_tag == "sentence-similarity"
    assert {"en", "de", "fr", "it"} <= set(data.language)


def test_the_examples_of_the_card_run(
    card: str, encoder: FastEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", card, flags=re.M | re.S)
    assert len(blocks) == 2
    for block in blocks:
        names: dict = {}
        exec(block, names)
    tokens = torch.from_numpy(encoder.tokenize(DOCUMENTS[:1], "Document: ")[0]).long()
    with torch.no_grad():
        hidden = names["model"].eval()(input_ids=tokens[None]).last_hidden_state[:, -1].numpy()
    assert cosines(encoder.encode_document(DOCUMENTS[:1]), hidden).min() >= 0.999999
    compression, mail = re.findall(r"[\d.]+", capsys.readouterr().out)
    assert float(mail) > float(compression)


def test_a_package_without_the_files_says_which_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(FOLDER, tmp_path / PACKAGED)
    monkeypatch.setattr("jv5kernels.checkpoint.find_packaged", lambda *_, **__: copy)
    (copy / "adapters/clustering/adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="clustering.* is missing, the adapter of task"):
        FastEncoder(PACKAGED)
