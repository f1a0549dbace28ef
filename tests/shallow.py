"The bundled model with its real weights and fewer layers: equality holds at any depth, and costs a third"
from ftcourse import models


def shallow(layers=10, **how):
    "The model alone, cut to its first layers"
    model = models.load(**how)[0]
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    model.config.layer_types = (getattr(model.config, "layer_types", None) or [])[:layers] or None
    return model
