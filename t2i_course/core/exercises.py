"""Exercises that check themselves."""


def grade(
    check,  # check(answer) raises AssertionError when the answer is wrong
    answer,  # what the reader wrote
    hint: str = "",  # shown with a wrong answer
):
    "Say whether an answer is right, and if not, why"
    hint = f"\nHint: {hint}" if hint else ""
    try:
        check(answer)
    except NotImplementedError:
        print("not tried yet: replace `raise NotImplementedError` by your answer and run the cell again")
    except AssertionError as e:
        print(f"not yet: {e}{hint}")
    except Exception as e:
        print(f"not yet: your code raised {type(e).__name__}: {e}{hint}")
    else:
        print("right")


def accepts_only(
    check,  # the checker of an exercise
    right,  # a correct answer
    *wrong,  # answers that a common mistake would give
):
    "The checker itself is checked: the solution passes, each wrong answer fails"
    check(right)
    for i, w in enumerate(wrong):
        try:
            check(w)
        except Exception:
            continue
        raise AssertionError(f"wrong answer {i + 1} was accepted")
    print(f"the solution passes; {len(wrong)} wrong answers are rejected")
