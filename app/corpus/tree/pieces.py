"""The nouns of source trees: files with their words, and the chunks that are embedded; no I/O."""

from typing import NamedTuple


class SourceFile(NamedTuple):
    """A text file of a tree: `path` from the root, with slashes; `hash` is of its bytes, hex.

    `language` is a name in lower case as people write it (`python`, `c++`), "" where it is not known.
    """

    path: str
    language: str
    size_bytes: int
    hash: str
    text: str


class Chunk(NamedTuple):
    """Neighbouring lines of a file, counted from 1, both ends included.

    `id` stays the same for the same words in the same file, wherever they move in it. `symbol` is what they define,
    from outside in (`Server.handle`, `Guide > Setup`), "" where nothing is. `tokens` and `hash` are of the `passage`.
    """

    id: str
    path: str
    language: str
    symbol: str
    start_line: int
    end_line: int
    text: str
    tokens: int
    hash: str

    @property
    def passage(self) -> str:
        """What is embedded: the words, and where they stand."""
        return passage(self.path, self.symbol, self.text)


def passage(path: str, symbol: str, text: str) -> str:
    """What is embedded of a chunk."""
    return f"{path}  {symbol}\n{text}" if symbol else f"{path}\n{text}"
