"Finished runs for the recipes that stand on others, as the tests make them."
import torch
from t2i_course.core.experiments import Arm, fit
from t2i_course.core.sources import load
from t2i_course.core.register import recipe as module_of


def uses_of(recipe, config, images=0, seed=0):
    "Role -> a run of the recipe that `uses_for` asks for; trained, or (0 images) as it was made"
    def run(name, changes, share):
        data, mod = load(config.data, config.size), module_of(name)
        own = mod.recipe_for(data, "smoke") | changes
        if images: return fit(mod.build, own, data, images, seed)
        torch.manual_seed(seed)
        return Arm(own, *mod.build(own), {})
    return {role: run(*asked) for role, asked in recipe.uses_for(config).items()} if hasattr(recipe, "uses_for") else {}


def built(recipe, config, images=0, seed=0):
    "Tokenizer and model of a recipe module, on such runs"
    uses = uses_of(recipe, config, images, seed)
    torch.manual_seed(seed)
    return recipe.build(config, **uses)
