"The quiz of a page, taken apart: questions, options, right answers."
import re
from dataclasses import dataclass

FORMS = (r"(?<![\w$^}|])\(([a-d])\)\s", r"(?<![\w($])([a-d])\)\s")  # `(a) text`, `a) text`
ANSWER = re.compile(r"<details>\s*<summary>.*?</summary>\s*\(?([a-d])\b.*?</details>", re.S)


@dataclass
class Question:
    "One question of a quiz."
    text: str     # what is asked
    options: dict # letter -> option
    right: str    # letter of the right option

    @property
    def right_is_longest(self):
        "Would a reader who always takes the longest option be right?"
        lengths = {letter: len(option) for letter, option in self.options.items()}
        return lengths.pop(self.right) > max(lengths.values())


def parse(asked, right):
    "The options stand behind the question, each behind its letter."
    for form in FORMS:
        marks = list(re.finditer(form, asked))
        letters = "".join(mark[1] for mark in marks)
        if letters and letters == "abcd"[:len(letters)]: break
    else: raise AssertionError(f"options a, b, c in this order, each behind its letter:\n{asked}")
    ends = [mark.start() for mark in marks[1:]] + [len(asked)]
    options = {mark[1]: re.sub(r"[,;]?\s*-?\s*$", "", asked[mark.end():end]) for mark, end in zip(marks, ends)}
    return Question(asked[:marks[0].start()].strip(), options, right)


def questions(chapter):
    "Every question of a chapter's quiz. What stands before a folded answer is its question."
    text = "\n".join(cell.source for cell in chapter.section("Quiz"))
    found, start = [], 0
    for answer in ANSWER.finditer(text):
        found.append(parse(text[start:answer.start()], answer[1]))
        start = answer.end()
    return found
