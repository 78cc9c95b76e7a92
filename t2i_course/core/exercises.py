"""Exercises that check themselves."""

from types import CodeType, FunctionType


def own_codes(
    answer,  # a function, a class, or a plain value
):
    "The code objects of an answer, at any depth"

    def inside(code):
        yield code
        for inner in code.co_consts:
            if isinstance(inner, CodeType):
                yield from inside(inner)

    parts = [answer]
    if isinstance(answer, type):
        parts = [part for kind in answer.__mro__ for part in vars(kind).values()]
    return {code for part in parts if isinstance(part, FunctionType) for code in inside(part.__code__)}


def kind_of(
    check,  # check(answer) raises AssertionError when the answer is wrong
    answer,  # what the reader wrote
):
    """(kind, why) of an answer: right; your turn (nothing written); rejected, by an assertion of the checker;
    misfit, when the checker cannot use what came back; crash, when the answer's own code raises"""
    try:
        check(answer)
    except NotImplementedError:
        return "your turn", ""
    except Exception as e:
        codes, step, own = [], e.__traceback__, own_codes(answer)
        while step:
            codes.append(step.tb_frame.f_code)
            step = step.tb_next
        if isinstance(e, AssertionError) and codes[-1] not in own:
            return "rejected", str(e)
        return "crash" if own & set(codes) else "misfit", f"{type(e).__name__}: {e}"
    return "right", ""


SAID = {
    "right": "right",
    "your turn": "your turn: write your answer above in place of `raise NotImplementedError`, "
    "run that cell, then this one",
    "rejected": "not yet: {}",
    "misfit": "not yet: what you return cannot be used here ({}). Is a `return` missing?",
    "crash": "not yet: your code raised {}",
}


def grade(
    check,  # check(answer) raises AssertionError when the answer is wrong
    answer,  # what the reader wrote
    hint: str = "",  # shown with a wrong answer
):
    "Say whether an answer is right, and if not, why"
    kind, why = kind_of(check, answer)
    wrong = kind not in ("right", "your turn")
    print(SAID[kind].format(why) + (f"\nHint: {hint}" if wrong and hint else ""))


def accepts_only(
    check,  # the checker of an exercise
    right,  # a correct answer
    *wrong,  # answers that a common mistake would give
):
    "The checker itself is checked: it passes the solution, and an assertion of its own rejects wrong answers"
    check(right)
    for n, answer in enumerate(wrong, 1):
        kind, why = kind_of(check, answer)
        if kind != "rejected":
            raise AssertionError(f"wrong answer {n}: {kind} {why}")
    print(f"the solution passes; {len(wrong)} wrong answers are rejected")
