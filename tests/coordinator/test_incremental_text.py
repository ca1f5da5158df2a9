from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edge_runtime.text import Detokenizer, StopMatcher, TextStream

DEMO = Path(__file__).parents[2] / "examples/models/moe/tokenizer.json"


def byte_level() -> Tokenizer:
    """One token per byte, so that every character but ASCII takes several, and one for " a"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(alphabet)} | {"Ġa": len(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab, [("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece() -> Tokenizer:
    words = ["<unk>", "▁Hello", "▁world", "s", "▁", "!"]
    vocab = {word: index for index, word in enumerate(words)} | {f"<0x{b:02X}>": 100 + b for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def stream(tokenizer, ids, prompt=()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@given(st.text(max_size=60))
def test_pieces_of_byte_level_text_add_up_and_never_hold_half_a_character(text):
    tokenizer = byte_level()
    ids = tokenizer.encode(text).ids
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 255), max_size=40))
def test_bytes_that_are_no_text_come_out_as_the_decoder_has_them(ids):
    tokenizer = byte_level()
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_of_four_byte_tokens_comes_out_with_its_last():
    tokenizer = byte_level()
    ids = tokenizer.encode("x🦀y").ids
    assert stream(tokenizer, ids) == ["x", "", "", "", "🦀", "y", ""]


def test_sentencepiece_words_keep_their_spaces():
    assert stream(sentencepiece(), [1, 2, 3, 5, 2]) == ["Hello", " world", "s", "!", " world", ""]


def test_a_word_after_the_prompt_keeps_its_space():
    assert stream(sentencepiece(), [2, 3], prompt=[1]) == [" world", "s", ""]


def test_sentencepiece_byte_fallback_is_put_together():
    ids = [1, *(100 + byte for byte in "你".encode()), 3]
    assert stream(sentencepiece(), ids) == ["Hello", "", "", "你", "s", ""]


def test_endless_bytes_without_a_character_are_let_out():
    pieces = stream(byte_level(), byte_level().encode("a").ids + [128] * 300)
    assert all(len(a) + len(b) < 80 for a, b in pairwise(pieces))
    assert len("".join(pieces)) >= 250


@pytest.mark.skipif(not DEMO.exists(), reason="the demo checkpoint is not here")
def test_the_demo_tokenizer_streams_source_code():
    tokenizer = Tokenizer.from_file(str(DEMO))
    text = "def f(x: int) -> str:\n    return f'{x}é — ✓'\n"
    assert "".join(stream(tokenizer, tokenizer.encode(text, add_special_tokens=False).ids)) == text


# ---------------------------------------------------------------- stop strings


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_are_found_wherever_the_pieces_are_cut(text, stops, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    edges = [0, *cuts, len(text)]
    matcher, given_out, stopped = StopMatcher(stops), "", False
    for start, end in pairwise(edges):
        certain, stopped = matcher.push(text[start:end])
        given_out += certain
        if stopped:
            break
    if not stopped:
        given_out += matcher.flush()
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert stopped == bool(ends)
    if not ends:
        assert given_out == text
    else:
        assert all(stop not in given_out for stop in stops)
        assert text.startswith(given_out)


def test_text_that_may_begin_a_stop_string_is_held_back():
    matcher = StopMatcher(["END"])
    assert [matcher.push(piece) for piece in ("a E", "N", "x", "EN", "D!")] == [
        ("a ", False),
        ("", False),
        ("ENx", False),
        ("", False),
        ("", True),
    ]


def test_the_last_token_lets_everything_out():
    ids = byte_level().encode("abcS").ids
    text = TextStream(byte_level(), (), ["STOP"])
    pieces = [text.push(token, is_last=token == ids[-1]) for token in ids]
    assert [piece.text for piece in pieces] == ["a", "b", "c", "S"]
    assert not pieces[-1].is_stop
