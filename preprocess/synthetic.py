"""`python -m preprocess synthesize`: a small captioned data set and its tokenizer, made from nothing.

    DIRECTORY/config.toml                     the options; other options do not mix into this directory
    DIRECTORY/tars/shapes-000000.tar ...      webdataset: 000000000.jpg|png, 000000000.txt, 000000000.json
    DIRECTORY/tokenizer/                      byte-level BPE: tokenizer.json, tokenizer_config.json

For the demo and the tests: no download, and captions that only a look at the picture predicts. The same
options give the same bytes (under the same Pillow and tokenizers), and files that are there are kept.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from preprocess.shapes import make_sample
from shared.config import load_config, to_toml
from shared.errors import UserError
from shared.files import atomic_path, write_json

USAGE = (
    "usage: python -m preprocess synthesize DIRECTORY "
    "[--samples N] [--samples_per_tar N] [--seed N] [--vocabulary_size N] [--json]"
)

SPECIAL_TOKENS = {
    "img_token": "<|image|>",
    "boi_token": "<|begin_of_image|>",
    "eoi_token": "<|end_of_image|>",
    "pad_token": "<|pad|>",
    "bos_token": "<|begin_of_text|>",
    "eos_token": "<|end_of_text|>",
}
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)  # every byte is a token: any text can be written


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthesizeConfig:
    """What to make; the defaults are the demo's."""

    samples: int = 4000
    samples_per_tar: int = 500
    seed: int = 0
    vocabulary_size: int = 512  # at most: a small set of captions has only so many pairs to merge

    def __post_init__(self) -> None:
        smallest = {"samples": 1, "samples_per_tar": 1, "seed": 0, "vocabulary_size": SMALLEST_VOCABULARY}
        for name, bound in smallest.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name} must be at least {bound}, got {getattr(self, name)}")


def main(argv: Sequence[str]) -> None:
    """The command. Raises `UserError` for wrong options or a directory made with others."""
    words = [word for word in argv if word != "--json"]
    if not words or words[0].startswith("-"):
        raise UserError(f"synthesize: no DIRECTORY given; {USAGE}")
    directory = Path(words[0])
    config = load_config(SynthesizeConfig, None, words[1:])
    _claim(directory, config)
    with Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    ) as progress:
        task = progress.add_task("drawing", total=config.samples)
        tars = write_shapes(
            directory / "tars",
            samples=config.samples,
            samples_per_tar=config.samples_per_tar,
            seed=config.seed,
            on_progress=lambda count: progress.advance(task, count),
        )
    train_tokenizer(tars, directory / "tokenizer", vocabulary_size=config.vocabulary_size)
    _report(directory, config, tars, as_json="--json" in argv)


def _claim(directory: Path, config: SynthesizeConfig) -> None:
    """Write the options down first; refuse a directory of other options, whose files would be kept."""
    path = directory / "config.toml"
    if path.exists():
        there = load_config(SynthesizeConfig, path)
        if there != config:
            raise UserError(
                f"{directory} was made with other options ({', '.join(to_toml(there).splitlines())}); "
                "name another directory or remove this one"
            )
        return
    try:
        with atomic_path(path) as temporary:
            temporary.write_text(to_toml(config), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{directory}: cannot write here: {error}") from None


def _report(directory: Path, config: SynthesizeConfig, tars: Sequence[Path], *, as_json: bool) -> None:
    vocabulary = Tokenizer.from_file(str(directory / "tokenizer" / "tokenizer.json")).get_vocab_size()
    tar_bytes = sum(path.stat().st_size for path in tars)
    if as_json:
        made = {"directory": str(directory), "samples": config.samples, "tars": len(tars)}
        print(json.dumps(made | {"tar_bytes": tar_bytes, "vocabulary": vocabulary}))
        return
    print(
        f"{config.samples} captioned pictures in {len(tars)} tars ({tar_bytes / 1e6:.1f} MB) "
        f"in {directory / 'tars'}, a tokenizer of {vocabulary} tokens in {directory / 'tokenizer'}"
    )


def write_shapes(
    directory: Path,
    *,
    samples: int,
    samples_per_tar: int,
    seed: int,
    on_progress: Callable[[int], object] = lambda count: None,
) -> list[Path]:
    """Write `samples` samples as `shapes-NNNNNN.tar` and return their paths; tars that are there are kept."""
    paths: list[Path] = []
    for start in range(0, samples, samples_per_tar):
        path = directory / f"shapes-{len(paths):06d}.tar"
        indices = range(start, min(start + samples_per_tar, samples))
        if path.exists():
            on_progress(len(indices))
        else:
            with atomic_path(path) as temporary:
                _write_tar(temporary, seed, indices, on_progress)
        paths.append(path)
    return paths


def _write_tar(path: Path, seed: int, indices: range, on_progress: Callable[[int], object]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index in indices:
            sample = make_sample(seed, index)
            members = {
                sample.extension: sample.picture,
                "txt": sample.caption.encode(),
                "json": json.dumps(sample.record).encode(),
            }
            for extension, content in members.items():
                # A bare TarInfo has no time, owner or mode of this machine: the same samples, the same bytes.
                member = tarfile.TarInfo(f"{index:09d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            on_progress(1)


def train_tokenizer(tars: Sequence[Path], directory: Path, *, vocabulary_size: int) -> None:
    """Train byte-level BPE on the captions in `tars`; write it in the Hugging Face form unless it is there.

    Every byte is in the alphabet, so any UTF-8 text comes back as it was. The special tokens have the last
    ids. `vocabulary_size` counts everything and is an upper bound.
    """
    if vocabulary_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocabulary_size must be at least {SMALLEST_VOCABULARY}, got {vocabulary_size}")
    tokenizer_path, config_path = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if tokenizer_path.exists() and config_path.exists():
        return
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_captions(tars), trainer)
    tokenizer.add_special_tokens(  # pyright: ignore[reportUnknownMemberType]  typed as a bare list
        [AddedToken(content, normalized=False) for content in SPECIAL_TOKENS.values()]
    )
    with atomic_path(tokenizer_path) as temporary:
        tokenizer.save(str(temporary), pretty=True)
    write_json(config_path, _tokenizer_config(tokenizer))


def _captions(tars: Sequence[Path]) -> Iterator[str]:
    for path in tars:
        try:
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.endswith(".txt") and (content := tar.extractfile(member)) is not None:
                        yield content.read().decode()
        except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: no captions can be read from this tar: {error}") from None


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, object]:
    """What `transformers` and `shared.tokens` read beside tokenizer.json."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {
        str(token_id): {"content": token.content, **flags}
        for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    return {
        "added_tokens_decoder": added,
        **SPECIAL_TOKENS,
        # The clean-up takes the space before punctuation away, and text would not come back as it was.
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
