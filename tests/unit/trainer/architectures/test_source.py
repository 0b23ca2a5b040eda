import tf_keras as keras
from tf_keras import layers

from trainer.architectures import build_model
from trainer.architectures.source import format_layers


def test_a_network_of_the_notes_reads_as_in_the_notes():
    assert format_layers(build_model("cnn_tapered", 46, 1, 10)) == (
        "model = Sequential([\n"
        "    Input((46, 46, 1)),\n"
        "    layers.Conv2D(46, 3, activation='relu'),\n"
        "    layers.MaxPooling2D(strides=2),\n"
        "    layers.Conv2D(16, 3, activation='relu'),\n"
        "    layers.MaxPooling2D(strides=2),\n"
        "    layers.Conv2D(32, 3, activation='relu'),\n"
        "    layers.MaxPooling2D(strides=2),\n"
        "    layers.Conv2D(64, 3, activation='relu'),\n"
        "    layers.MaxPooling2D(strides=2),\n"
        "    layers.Flatten(),\n"
        "    layers.Dense(1024, activation='relu'),\n"
        "    layers.Dense(10),\n"
        "])"
    )


def test_what_differs_from_the_defaults_is_shown():
    text = format_layers(build_model("alexnet", 67, 1, 10))
    assert "layers.Conv2D(96, 11, strides=4, activation='relu')," in text
    assert "layers.Conv2D(256, 5, padding='same', activation='relu')," in text
    assert "layers.MaxPooling2D(pool_size=3, strides=2)," in text
    assert "layers.Dropout(0.5)," in text


def branching_network() -> keras.Model:
    images = keras.Input((8, 8, 3), name="images")
    wide = layers.Conv2D(4, (1, 3), padding="same", kernel_initializer="he_normal", name="wide")(images)
    high = layers.Conv2D(4, (3, 1), padding="same", use_bias=False, name="high")(images)
    joined = layers.Concatenate(name="joined")([wide, high])
    added = layers.Add(name="added")([joined, joined])
    return keras.Model(images, added)


def test_branches_are_calls_of_named_layers():
    assert format_layers(branching_network()) == (
        "images = Input((8, 8, 3))\n"
        "wide = layers.Conv2D(4, (1, 3), padding='same', kernel_initializer='he_normal')(images)\n"
        "high = layers.Conv2D(4, (3, 1), padding='same', use_bias=False)(images)\n"
        "joined = layers.Concatenate()([wide, high])\n"
        "added = layers.Add()([joined, joined])"
    )


def test_the_code_builds_the_network_again():
    names = {"Input": keras.Input, "layers": layers}
    exec(format_layers(branching_network()), names)
    rebuilt, original = keras.Model(names["images"], names["added"]), branching_network()
    assert rebuilt.output_shape == original.output_shape
    assert rebuilt.count_params() == original.count_params()
