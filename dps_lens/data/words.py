"""Words of any script: what retrieval and ROUGE count where spaces do not separate words."""

import unicodedata
from collections.abc import Iterable
from itertools import pairwise
from typing import Literal, TypeAlias

import regex

RetrievalTokens: TypeAlias = Literal["auto", "whitespace", "script"]

_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}\u3005-\u3007\u30FC"
"""Scripts that are written without spaces between words; 々, 〇 and ー belong to none."""
# Some vowel signs are characters of their own to Unicode; they belong to what stands before them.
_CHARACTER = rf"(?:(?=[{_UNSPACED}])(?=[\p{{L}}\p{{N}}])\X(?:(?=[{_UNSPACED}])\p{{M}})*)"
_RUNS = regex.compile(rf"({_CHARACTER}+)|[[\p{{L}}\p{{N}}\p{{M}}]--[{_UNSPACED}]]+", regex.V1)
_CHARACTERS = regex.compile(_CHARACTER, regex.V1)
_LETTERS = regex.compile(r"\p{L}")
_SAMPLE, _ENOUGH = 200, 0.1


def script_words(text: str, *, pairs: bool = False) -> list[str]:
    """Runs of letters and digits, casefolded; single characters in scripts without spaces, with their marks.

    Args:
        text: in any script.
        pairs: in scripts without spaces, pairs of neighbouring characters; a character that stands alone is one.

    >>> script_words("Café № 7: 我爱你")
    ['café', 'no', '7', '我', '爱', '你']
    >>> script_words("我爱你 a", pairs=True)
    ['我爱', '爱你', 'a']
    """
    found: list[str] = []
    for match in _RUNS.finditer(unicodedata.normalize("NFKC", text).casefold()):
        if match[1] is None:
            found.append(match[0])
            continue
        characters = _CHARACTERS.findall(match[1])
        found += ["".join(two) for two in pairwise(characters)] if pairs and len(characters) > 1 else characters
    return found


def retrieval_words(text: str, tokens: RetrievalTokens) -> list[str]:
    """What BM25 counts: whitespace tokens as LaMP's code does, or the words and pairs of `script_words`."""
    return script_words(text, pairs=True) if tokens == "script" else text.split()


def tokens_for(texts: Iterable[str]) -> RetrievalTokens:
    """`"script"` where at least a tenth of the letters belong to scripts without spaces, else `"whitespace"`."""
    unspaced = letters = 0
    for text in texts:
        unspaced += len(_CHARACTERS.findall(text[:_SAMPLE]))
        letters += len(_LETTERS.findall(text[:_SAMPLE]))
    return "script" if unspaced and unspaced >= _ENOUGH * letters else "whitespace"


def foreign_share(texts: Iterable[str]) -> float:
    """How many of the letters are not a–z, as a share of all; 0 where there are none."""
    letters = [letter for text in texts for letter in _LETTERS.findall(text)]
    return sum(not letter.isascii() for letter in letters) / max(len(letters), 1)
