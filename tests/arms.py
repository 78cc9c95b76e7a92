"The arms of a chapter's sweep, as the tests make them."
from t2i_course.run.arms import twin


def made(module, scale="smoke", seeds=(0,), **runs):
    "Every arm of a chapter; no two of them may come out the same."
    done = {}
    for key, make in module.experiments(scale, seeds, **runs):
        value = make()
        assert not twin(key, value, done, getattr(module, "MAY_AGREE", ())), (key, twin(key, value, done))
        done[key] = value
    return done
