import pytest

from safe_rlhf_jax.serving.answers import Answer, Job, begun

END = 0
TEXTS = {1: "a", 2: "b", 3: "c", 4: "ab", 5: "é"}


def decode(ids):
    """Token 6 is the first byte of é, token 7 its second."""
    raw = b"".join({6: b"\xc3", 7: b"\xa9"}.get(i, TEXTS.get(i, "").encode()) for i in ids)
    return raw.decode(errors="replace")


def told(chunks, *, stops=(), max_tokens=100):
    """What an answer tells after each chunk of tokens, and the answer."""
    answer = Answer(Job([], [1], print, max_tokens=max_tokens, stops=stops), 0, decode, {END})
    return [answer.take(chunk) for chunk in chunks], answer


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize(
    ("ids", "stops", "most", "text", "finish", "tokens"),
    [
        ([1, 2, 3, END], (), 100, "abc", "stop", 4),
        ([1, 2, 3, END], (), 2, "ab", "length", 2),
        ([1, 2, 3, END], (), 4, "abc", "stop", 4),
        ([1, 2, 3, 1, END], ("c",), 100, "ab", "stop", 3),
        ([1, 2, 3, 1, END], ("bca", "zz"), 100, "a", "stop", 4),
        ([1, 2, 2, 3, END], ("bbb",), 100, "abbc", "stop", 5),
        ([1, 1, 2, 3, END], ("ab", "bc"), 100, "a", "stop", 3),
        ([3, 4, END], ("b",), 100, "ca", "stop", 2),
        ([6, 7, 1, END], (), 100, "éa", "stop", 4),
        ([1, 6, END], (), 100, "a\ufffd", "stop", 3),
        ([1, 2, 3, 1], ("bcab",), 4, "abca", "length", 4),
    ],
)
def test_an_answer_is_the_same_in_chunks_of_any_size(ids, stops, most, text, finish, tokens, size):
    answer = Answer(Job([], [1], print, max_tokens=most, stops=stops), 0, decode, {END})
    found = ""
    for start in range(0, len(ids), size):
        found += answer.take(ids[start : start + size])
        if answer.finish:
            break
    assert (found, answer.text, answer.finish, len(answer.ids)) == (text, text, finish, tokens)


def test_what_may_become_a_stop_is_withheld():
    assert told([[1], [2], [3], [1]], stops=("bcb",))[0] == ["a", "", "", "bca"]
    assert begun("xyz", ("zz", "yzx")) == 2


def test_an_unfinished_character_is_withheld():
    assert told([[1, 6], [7]])[0] == ["a", "é"]
