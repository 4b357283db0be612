"""Token ids, and text to tokens in a way that text can never produce a special one.

    [bos] text.. <begin_image> [image] * n <end_image> text.. <eos>

Special tokens are named in the tokenizer's own files: `tokenizer_config.json` says which string plays which
part, `tokenizer.json` (or `added_tokens_decoder` in the config) gives its id.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shared.errors import UserError
from shared.files import read_json, sha256

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Where a chat template lies if it is not in tokenizer_config.json; part of the tokenizer where they exist.
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
# Where a data set keeps the files that its sources' configs name beside them, such as a template: SOURCE/NAME.
SOURCE_FILES = "source_files"

Tokens = npt.NDArray[np.int32]

# Part a token plays -> key of tokenizer_config.json that names it. torchtitan's keys for the image tokens.
_CONFIG_KEYS = {
    "bos": "bos_token",
    "eos": "eos_token",
    "pad": "pad_token",
    "image": "img_token",
    "begin_image": "boi_token",
    "end_image": "eoi_token",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenIds:
    """Ids of the special tokens, the vocabulary they live in, and the hash of the files they came from."""

    bos: int | None
    eos: int
    pad: int
    image: int
    begin_image: int
    end_image: int
    vocabulary_size: int
    tokenizer_sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenNames:
    """Overrides of what `tokenizer_config.json` says; an empty string takes the tokenizer's own name.

    `bos = "none"` starts documents without a begin token, for tokenizers that have none.
    """

    bos: str = ""
    eos: str = ""
    pad: str = ""
    image: str = ""
    begin_image: str = ""
    end_image: str = ""


@dataclass(frozen=True, slots=True)
class TextTokenizer:
    """A tokenizer whose text can only become text.

    inner: the same for text that something of its document precedes; another where a SentencePiece tokenizer puts
    a space before the first word of a document alone.
    """

    tokenizer: Tokenizer
    inner: Tokenizer
    ids: TokenIds

    def encode(self, texts: Sequence[str], *, inner: bool = False) -> list[Tokens]:
        """int32 ids of each text, without begin or end tokens; a special token's name in it stays text.

        inner: the texts do not begin their document.
        """
        tokenizer = self.inner if inner else self.tokenizer
        encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encoded]

    def encode_with_offsets(
        self, texts: Sequence[str], *, inner: bool = False
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """`encode`, with the characters [start, end) that each token was made from."""
        tokenizer = self.inner if inner else self.tokenizer
        encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encoded]

    def are_special(self, tokens: Tokens) -> npt.NDArray[np.bool_]:
        """Where encoded text holds a special id in spite of everything.

        A vocabulary that lists a special string as an ordinary entry too can do that; such text is rejected.
        """
        ids = self.ids
        special = [ids.eos, ids.pad, ids.image, ids.begin_image, ids.end_image]
        return np.isin(tokens, special if ids.bos is None else [*special, ids.bos])

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


def load_tokenizer(directory: Path, names: TokenNames | None = None) -> TextTokenizer:
    """Read `tokenizer.json` and `tokenizer_config.json` and resolve the special tokens.

    Raises:
        UserError: a file is missing or broken, or a special token is absent; names all that are.
    """
    config = _read_files(directory)
    tokenizer = _open(directory, config)
    ids = _resolve(directory, tokenizer, config, names or TokenNames())
    return TextTokenizer(tokenizer, _inner(tokenizer), ids)


def reopen_tokenizer(directory: Path, ids: TokenIds) -> TextTokenizer:
    """The tokenizer kept in a data set, with the special tokens that its `dataset.json` names.

    Raises:
        UserError: the files are not those that the data set was made with.
    """
    tokenizer = _open(directory, _read_files(directory))
    if tokenizer_hash(directory) != ids.tokenizer_sha256:
        raise UserError(
            f"tokenizer {directory}: is not the one that the data set was made with; copy it again"
        )
    return TextTokenizer(tokenizer, _inner(tokenizer), ids)


def _open(directory: Path, config: dict[str, Any]) -> Tokenizer:
    """The tokenizer with its declared special tokens, set so that text can only become text."""
    from tokenizers import AddedToken, Tokenizer

    # Batches here are small and many processes run at once: one thread each.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception for any malformed file
        raise UserError(f"tokenizer {directory}: tokenizer.json is not a tokenizer ({error})") from None
    declared = _declared_tokens(directory, config)
    # In id order, because entries that tokenizer.json does not know get the next free id.
    tokenizer.add_special_tokens(
        [
            AddedToken(
                entry["content"],
                special=True,
                normalized=False,
                lstrip=bool(entry.get("lstrip")),
                rstrip=bool(entry.get("rstrip")),
            )
            for _, entry in sorted(declared.items())
        ]
    )
    for number, content in ((number, entry["content"]) for number, entry in declared.items()):
        if tokenizer.token_to_id(content) != number:
            raise UserError(
                f"tokenizer {directory}: tokenizer_config.json gives {content!r} id {number}, tokenizer.json "
                f"{tokenizer.token_to_id(content)}; make the two files agree"
            )
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _inner(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without the space before the first word; itself where it puts none, or one before every text."""
    from tokenizers import Tokenizer

    if "prepend_scheme=first" not in repr(tokenizer.pre_tokenizer):
        return tokenizer
    content = json.loads(tokenizer.to_str())
    rules = json.dumps(content["pre_tokenizer"])
    content["pre_tokenizer"] = json.loads(
        rules.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    )
    inner = Tokenizer.from_str(json.dumps(content))
    inner.encode_special_tokens = True
    return inner


def tokenizer_files(directory: Path) -> list[str]:
    """The files that make a tokenizer, relative to its directory: the two there must be, then chat templates."""
    patterns = (*TEMPLATE_FILES, f"{SOURCE_FILES}/*/*")
    others = [path for pattern in patterns for path in sorted(directory.glob(pattern))]
    return [*TOKENIZER_FILES, *(str(path.relative_to(directory)) for path in others)]


def kept_files(directory: Path, sources: Mapping[str, Sequence[Path]]) -> dict[str, Path]:
    """Files by the names under which a data set keeps them: the tokenizer's, and those of each source.

    They are in the order in which `tokenizer_files` finds them there. Where `directory` is the tokenizer of another
    data set, what that one's sources named is not taken along.
    """
    names = (name for name in tokenizer_files(directory) if not name.startswith(f"{SOURCE_FILES}/"))
    files = {name: directory / name for name in names}
    files |= {f"{SOURCE_FILES}/{source}/{path.name}": path for source, own in sources.items() for path in own}
    return dict(sorted(files.items(), key=lambda file: _source_parts(file[0])))


def _source_parts(name: str) -> tuple[str, ...]:
    return PurePath(name).parts if name.startswith(f"{SOURCE_FILES}/") else ()


def tokenizer_hash(directory: Path, sources: Mapping[str, Sequence[Path]] | None = None) -> str:
    """Of all files that a data set keeps, and of the names of those that may be there.

    sources: the files of its sources; None where `directory` is the data set's own, which holds them.
    """
    if sources is None:
        files = {name: directory / name for name in tokenizer_files(directory)}
    else:
        files = kept_files(directory, sources)
    return sha256(
        *(
            (b"" if name in TOKENIZER_FILES else name.encode()) + path.read_bytes()
            for name, path in files.items()
        )
    )


def _read_files(directory: Path) -> dict[str, Any]:
    for name in TOKENIZER_FILES:
        if not (directory / name).is_file():
            raise UserError(
                f"tokenizer {directory}: no {name}; expected a directory with {' and '.join(TOKENIZER_FILES)}"
            )
    config = read_json(directory / "tokenizer_config.json", mend="take the tokenizer's own file again")
    if not isinstance(config, dict):
        raise UserError(f"tokenizer {directory}: tokenizer_config.json is not a JSON object")
    return config


def _declared_tokens(directory: Path, config: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The special tokens that `added_tokens_decoder` declares, by id: `content` and flags."""
    declared = config.get("added_tokens_decoder", {})
    try:
        return {
            int(number): {**entry, "content": str(entry["content"])}
            for number, entry in declared.items()
            if entry.get("special")
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(
            f"tokenizer {directory}: added_tokens_decoder in tokenizer_config.json is not a table of ids with "
            f"their `content`; take the tokenizer's own file again"
        ) from None


def _resolve(directory: Path, tokenizer: Tokenizer, config: dict[str, Any], names: TokenNames) -> TokenIds:
    found: dict[str, int] = {}
    missing: list[str] = []
    for part, key in _CONFIG_KEYS.items():
        name = getattr(names, part) or _content(config.get(key))
        if part == "bos" and (name == "none" or not name):
            continue
        identifier = tokenizer.token_to_id(name) if name else None
        if identifier is None:
            missing.append(f"{part} ({f'{name!r} is not in the vocabulary' if name else f'no {key}'})")
        else:
            found[part] = identifier
    if missing:
        raise UserError(
            f"tokenizer {directory}: special tokens missing: {', '.join(missing)}; add them to the tokenizer or "
            f"name them in the config, section [tokens]"
        )
    if len(set(found.values())) < len(found) - int(found["pad"] == found["eos"]):
        raise UserError(f"tokenizer {directory}: two special tokens share one id: {found}; give each its own")
    return TokenIds(
        bos=found.get("bos"),
        eos=found["eos"],
        pad=found["pad"],
        image=found["image"],
        begin_image=found["begin_image"],
        end_image=found["end_image"],
        vocabulary_size=max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1,
        tokenizer_sha256=tokenizer_hash(directory),
    )


def _content(entry: Any) -> str:
    """A token in tokenizer_config.json is a string, or an object with its `content`."""
    return str(entry.get("content", "")) if isinstance(entry, dict) else str(entry or "")
