"""What holds for every caption under every rule: no tag is lost or invented, kept ones stay, equal draws repeat."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from lora_trainer.dataset.rules import SEPARATOR, Rules, variants
from lora_trainer.training.randomness import Draws

SAME_EVERYWHERE = settings(deadline=None, derandomize=True, max_examples=100)
WORD = st.text("abcé猫 '-", min_size=1, max_size=6).map(lambda text: " ".join(text.split())).filter(bool)
# As in the WebUI's prompts: brackets, escapes, emphasis.
PROMPT = st.one_of(WORD, WORD.map(lambda w: f"({w}, {w}:1.2)"), WORD.map(lambda w: f"[{w}, {w}]"), st.just("b\\(c\\)"))
TAGS = st.lists(WORD, min_size=1, max_size=8)
VISITS = st.integers(0, 10**6)
SHARES = st.sampled_from([0.0, 0.3, 0.7, 1.0])


def tags(caption: str) -> list[str]:
    return caption.split(", ") if caption else []


@SAME_EVERYWHERE
@given(TAGS, st.integers(0, 10), VISITS)
def test_shuffling_keeps_every_tag_and_the_first_ones_in_order(given_tags, keep, visit):
    rules = Rules(shuffle=True, keep_tokens=keep)
    drawn = tags(rules.drawn(", ".join(given_tags), Draws(1, visit)))
    assert Counter(drawn) == Counter(given_tags)
    assert drawn[:keep] == given_tags[:keep]


@SAME_EVERYWHERE
@given(TAGS, st.integers(0, 10), SHARES, st.booleans(), VISITS)
def test_dropout_only_removes_and_never_what_is_kept(given_tags, keep, share, shuffle, visit):
    rules = Rules(shuffle=shuffle, keep_tokens=keep, tag_dropout=share)
    drawn = tags(rules.drawn(", ".join(given_tags), Draws(1, visit)))
    assert Counter(drawn) <= Counter(given_tags)
    assert drawn[:keep] == given_tags[:keep]
    if not shuffle:
        rest = iter(given_tags)
        assert all(tag in rest for tag in drawn)
    if share == 1:
        assert drawn == given_tags[:keep]
    if share == 0:
        assert len(drawn) == len(given_tags)


@SAME_EVERYWHERE
@given(TAGS, TAGS, st.none() | TAGS, SHARES, VISITS)
def test_the_separator_keeps_what_is_before_and_after_it(first, middle, last, share, visit):
    rules = Rules(shuffle=True, keep_tokens=1, tag_dropout=share)
    text = SEPARATOR.join(", ".join(part) for part in (first, middle, last) if part is not None)
    drawn = tags(rules.drawn(text, Draws(1, visit)))
    last = last or []
    assert drawn[: len(first)] == first
    assert drawn[len(drawn) - len(last) :] == last
    assert Counter(drawn[len(first) : len(drawn) - len(last)]) <= Counter(middle)
    assert tags(Rules().drawn(text, Draws(1, visit))) == [*first, *middle, *last]


@SAME_EVERYWHERE
@given(st.lists(st.lists(PROMPT, min_size=1, max_size=4), min_size=1, max_size=3), VISITS)
def test_prompts_are_mixed_outside_their_brackets_and_between_their_breaks(parts, visit):
    rules = Rules(shuffle=True, prompts=True)
    drawn = rules.drawn(" BREAK ".join(", ".join(part) for part in parts), Draws(1, visit)).split(" BREAK ")
    assert len(drawn) == len(parts)
    for mixed, part in zip(drawn, parts, strict=True):
        assert Counter(_prompt_tags(mixed)) == Counter(part)


def _prompt_tags(text: str) -> list[str]:
    """Independent of the code: joins pieces until their brackets match."""
    found, open_ = [], ""
    for piece in text.split(", "):
        open_ = f"{open_}, {piece}" if open_ else piece
        bare = open_.replace("\\(", "").replace("\\)", "")
        if bare.count("(") == bare.count(")") and bare.count("[") == bare.count("]"):
            found.append(open_)
            open_ = ""
    assert not open_
    return found


@SAME_EVERYWHERE
@given(TAGS, SHARES, VISITS)
def test_the_trigger_words_stay_first(given_tags, share, visit):
    rules = Rules(shuffle=True, tag_dropout=share, trigger_words=("other", "My Style, sks"))
    drawn = rules.drawn(", ".join(["my style", "sks", *given_tags]), Draws(1, visit))
    assert drawn.startswith("my style, sks")


RULES = st.builds(
    Rules,
    prefix=st.sampled_from(["", "photo of"]),
    suffix=st.sampled_from(["", "end"]),
    shuffle=st.booleans(),
    keep_tokens=st.integers(0, 3),
    tag_dropout=SHARES,
    caption_dropout=SHARES,
    wildcards=st.booleans(),
    prompts=st.booleans(),
)
PIECE = st.one_of(
    WORD, st.just("{a|b, c|}"), st.just("{{x}}"), st.just("y ||| z"), st.just("(a, b)"), st.just("a BREAK b")
)
CAPTIONS = st.lists(st.lists(PIECE, min_size=1, max_size=3).map(", ".join), min_size=1, max_size=2).map("\n".join)


@SAME_EVERYWHERE
@given(RULES, CAPTIONS, st.integers(0, 2**32), VISITS)
def test_equal_draws_are_equal_and_all_of_them_are_listed(rules, caption, seed, visit):
    drawn = rules.drawn(caption, Draws(seed, visit))
    assert drawn == rules.drawn(caption, Draws(seed, visit))
    assert "\n" not in drawn
    listed = variants(rules, caption, 300)
    assert listed is None or drawn in listed
    if listed is not None and max(rules.caption_dropout, rules.tag_dropout) < 1:
        assert rules.plain(caption) == listed[0]
    if not drawn:
        assert rules.caption_dropout or rules.tag_dropout or "|}" in caption
    letters = Counter(character for character in drawn if character not in " ,")
    assert set(letters) <= set(rules.vocabulary(caption))


@settings(SAME_EVERYWHERE, max_examples=10)
@given(st.lists(WORD, min_size=1, max_size=3, unique=True), st.booleans())
def test_everything_that_is_listed_is_drawn_some_time(given_tags, shuffle):
    rules = Rules(shuffle=shuffle, tag_dropout=0.5, caption_dropout=0.2)
    listed = variants(rules, ", ".join(given_tags), 100)
    seen = {rules.drawn(", ".join(given_tags), Draws(0, visit)) for visit in range(1000)}
    assert seen == set(listed)


def test_shares_are_what_is_asked_for():
    rules, visits = Rules(caption_dropout=0.1), range(5_000)
    empty = sum(rules.drawn("a", Draws(3, visit)) == "" for visit in visits)
    assert abs(empty / len(visits) - 0.1) < 0.015
    rules = replace(rules, caption_dropout=0.0, wildcards=True)
    counts = Counter(rules.drawn("{a|b|c|d}", Draws(3, visit)) for visit in visits)
    assert all(abs(count / len(visits) - 0.25) < 0.025 for count in counts.values())
    orders = Counter(Rules(shuffle=True).drawn("a, b, c", Draws(3, visit)) for visit in visits)
    assert len(orders) == 6
    assert all(abs(count / len(visits) - 1 / 6) < 0.02 for count in orders.values())


def test_known_captions():
    first = Draws(0, 0)
    assert Rules().drawn("a,b ,, c {x|y} ", first) == "a,b ,, c {x|y} "
    assert Rules(wildcards=True).plain("a {x|y} cat, {|z}, {{b}}") == "a x cat, {b}"
    assert Rules(prefix="photo,", suffix="end").plain("a cat") == "photo, a cat end"
    assert Rules(prefix="photo", caption_dropout=1.0).drawn("a cat", Draws(0, 1)) == ""
    assert variants(Rules(wildcards=True), "{a|b} {c|d}", 4) == ("a c", "b c", "a d", "b d")
    assert variants(Rules(wildcards=True), "{a|b} {c|d}", 3) is None
    assert variants(Rules(shuffle=True), ", ".join(map(str, range(500))), 32) is None
    assert variants(Rules(), "a cat", 1) == ("a cat",)
