"What a page owes its reader. What is not kept everywhere yet stands in `still.json`, page by page."
import json
from collections import Counter

import pytest
import still
from quiz import questions
from tree import chapters

CHAPTERS = chapters()
every_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=str)


# --- Quiz ---

@every_chapter
def test_right_letters_are_spread(chapter):
    "No letter holds more than two of the five: whoever always takes b must fail."
    found = questions(chapter)
    letters = Counter(question.right for question in found)
    assert len(found) == 5 and max(letters.values()) <= 2, letters
    for question in found: assert question.right in question.options, question


def test_right_letters_are_spread_over_the_course():
    letters = Counter(question.right for chapter in CHAPTERS for question in questions(chapter))
    assert max(letters.values()) <= .4 * letters.total(), letters


@pytest.mark.parametrize("place", range(5))
def test_no_place_of_the_quiz_has_its_letter(place):
    "The pages together, question by question: the third answer is not c everywhere."
    letters = Counter(questions(chapter)[place].right for chapter in CHAPTERS)
    assert max(letters.values()) <= .5 * letters.total(), letters


# --- Limits, with the list of what is still beyond them ---

@pytest.mark.parametrize("rule", still.RULES)
def test_what_is_still_to_be_mended_gets_less(rule):
    "A page that became worse is mended; one that became better leaves the list: `python tests/still.py`."
    new, old = still.measured(rule), still.listed(rule)
    assert not still.worse(old, new), f"{rule}: mend the page, not the list"
    assert new == old, f"{rule}: a page became better: bring the list down with `python tests/still.py`"


def test_the_list_of_what_is_still_to_be_mended_has_no_other_rule():
    assert set(json.loads(still.FILE.read_text(encoding="utf-8"))) == set(still.RULES)
