"The judges that are shipped with the package."

from t2i_course.core.metrics import make_judges


def make(
    out=None,  # folder; default: where the package keeps its judges
):
    "Train them all and write them down; in place of arms"
    make_judges(out)
