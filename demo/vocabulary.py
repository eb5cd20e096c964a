"""The demo model's own small vocabulary, learned from the captions that it is trained on."""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from clip import BYTE_SYMBOLS, END, START, WORD_END, merge_pair, split_words, word_symbols


def learn_merges(texts: Iterable[str], count: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learn byte-pair merges: again and again join the most frequent pair of neighbouring symbols. Sennrich et al.
    2016, "Neural Machine Translation of Rare Words with Subword Units". Returns the (vocab, merges) of a
    `clip.Tokenizer`, ids in CLIP's order: 256 byte symbols, the same as word ends, the merges, start, end. Fewer
    than `count` merges when every word has become a token."""
    words = Counter(word for text in texts for word in split_words(text))
    spelled = {word: word_symbols(word) for word in words}
    merges = []
    while len(merges) < count:
        pairs = Counter()
        for word, symbols in spelled.items():
            for pair in pairwise(symbols):
                pairs[pair] += words[word]
        if not pairs:
            break
        # The pair itself breaks ties, so that the order of the texts does not matter.
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        spelled = {word: merge_pair(symbols, merges[-1]) for word, symbols in spelled.items()}
    symbols = list(BYTE_SYMBOLS.values())
    tokens = [*symbols, *(s + WORD_END for s in symbols), *map("".join, merges), START, END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges
