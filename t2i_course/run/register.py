"""Which recipes and chapters there are, and their modules."""

from importlib import import_module

from t2i_course.core.files import CourseError


def at(part, *names) -> dict:
    return {name: f"t2i_course.{part}.{name}" for name in names}


RECIPES = (
    dict(gan="t2i_course.gan.adversarial")
    | at("gan", "stylegan2", "biggan", "text_gan")
    | at("codec", "vae", "vqvae", "vqvae2", "dvae")
    | at("diffusion", "ddpm")
    | at("transformer", "dit")
    | at("flow", "flow_matching")
    | at("ar", "pixelcnn", "dalle", "parti", "cm3leon")
)


CHAPTERS = (
    {RECIPES[k].split(".")[-1]: RECIPES[k] for k in RECIPES}
    | at("core", "metrics")
    | at("diffusion", "schedules", "samplers", "preconditioning", "guidance", "terminal_snr")
    | at("scale", "mixed_precision", "fsdp", "pipeline", "recipes")
    | at("capstone", "report_card")
)


def module(name: str, table: dict = RECIPES):
    "The module of a recipe or chapter"
    if name not in table:
        raise CourseError(f"there is no '{name}': choose {', '.join(table)}")
    return import_module(table[name])
