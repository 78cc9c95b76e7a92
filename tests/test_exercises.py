"Every exercise of the course, put to its own checker: the untouched cell, the solution, answers without thought, neighbouring methods."
import pytest
from exercising import answers_without_thought, exercises, verdict
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


def test_the_untouched_cell_is_the_readers_turn(page):
    "It neither fails nor is it graded."
    for exercise in page[1]: assert verdict(exercise.check, exercise.template)[0] == "your turn", exercise.name


def test_the_solution_is_right(page):
    for exercise in page[1]:
        assert verdict(exercise.check, exercise.right) == ("right", ""), exercise.name
        assert verdict(exercise.proof, exercise.right) == ("right", ""), exercise.name


def test_the_pages_own_wrong_answers_are_rejected_by_the_checker(page):
    "Not by an error in the wrong answer itself: that would prove nothing."
    for exercise in page[1]:
        assert exercise.wrong, exercise.name
        for n, answer in enumerate(exercise.wrong, 1):
            said, why = verdict(exercise.proof, answer)
            assert said == "rejected" and why, f"{exercise.name}, wrong answer {n}: {said} {why}"


def test_an_answer_without_thought_is_not_right(page):
    for exercise in page[1]:
        for name, answer in answers_without_thought(exercise).items():
            said, why = verdict(exercise.check, answer)
            assert said in ("rejected", "misfit"), f"{exercise.name}, {name}: {said} {why}"
            if name not in ("None", "0"): assert said == "rejected", f"{exercise.name}, {name}: {said} {why}"


def test_a_neighbouring_method_is_rejected(page):
    chapter, found, names = page
    for number, name, source in NEIGHBOURS.get(chapter.address, ()):
        exercise, own = found[number - 1], dict(names)
        exec(source, own)
        said, why = verdict(exercise.check, own["answer"])
        assert said == "rejected" and why, f"{exercise.name}, {name}: {said} {why}"


def test_every_neighbour_belongs_to_a_page():
    assert set(NEIGHBOURS) <= {chapter.address for chapter in chapters()}
