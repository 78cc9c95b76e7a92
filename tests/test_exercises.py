"Every exercise of the course, put to its own checker: the untouched cell, the solution, answers without thought, neighbouring methods."
import pytest
from exercising import answers_without_thought, exercises, put
from neighbours import NEIGHBOURS
from tree import chapters

PAGES = [pytest.param(chapter, id=str(chapter), marks=pytest.mark.xdist_group(f"exercises {chapter}")) for chapter in chapters()]


@pytest.fixture(scope="module", params=PAGES)
def page(request, tmp_path_factory):
    "The exercises of a page, at smoke scale, and the names that its answers may use."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("T2I_SCALE", "smoke")
        patch.chdir(request.param.path.parent)
        found, names = exercises(request.param)
        yield request.param, found, names


def unlike(wanted, exercise, check, answers):
    "One line for each answer ({what it is: answer}) whose verdict is another than wanted."
    for name, answer in answers.items():
        said, why = put(check, answer)
        if said not in wanted or said == "rejected" and not why: yield f"{exercise.name}, {name}: {said} {why}"


def test_the_untouched_cell_is_the_readers_turn(page):
    "It neither fails nor is it graded."
    assert len(page[1]) == 3 and all(e.check and e.template and e.right for e in page[1])
    assert not [line for e in page[1] for line in unlike({"your turn"}, e, e.check, {"the untouched cell": e.template})]


def test_the_solution_is_right(page):
    assert not [line for e in page[1] for line in unlike({"right"}, e, e.check, {"the solution": e.right})]


def test_the_pages_own_wrong_answers_are_rejected_by_the_checker(page):
    "By an assertion of the checker, not by an error in the wrong answer itself: that would prove nothing."
    for e in page[1]: assert len(e.wrong) >= 2 and e.proof is e.check, e.name
    assert not [line for e in page[1] for line in unlike({"rejected"}, e, e.check, dict(enumerate(e.wrong, 1)))]


def test_an_answer_without_thought_is_not_right(page):
    "What has the form of an answer must be rejected by an assertion; a checker may stumble over None and over a bare 0."
    answers = {e.name: answers_without_thought(e) for e in page[1]}
    bare = {name: {k: v for k, v in every.items() if k in ("None", "0")} for name, every in answers.items()}
    formed = {name: {k: v for k, v in every.items() if k not in bare[name]} for name, every in answers.items()}
    assert not [line for e in page[1] for line in unlike({"rejected", "misfit"}, e, e.check, bare[e.name])]
    assert not [line for e in page[1] for line in unlike({"rejected"}, e, e.check, formed[e.name])]


def test_a_neighbouring_method_is_rejected(page):
    chapter, found, names = page
    for number, name, source in NEIGHBOURS.get(chapter.address, ()):
        exercise, own = found[number - 1], dict(names)
        exec(source, own)
        assert not list(unlike({"rejected"}, exercise, exercise.check, {name: own["answer"]}))


def test_every_neighbour_belongs_to_a_page():
    assert set(NEIGHBOURS) <= {chapter.address for chapter in chapters()}
