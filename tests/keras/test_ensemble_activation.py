"""Outputs become probabilities once: what the loss, the last layer and a first look at the outputs say of them."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, losses, ops

from snapcore import DataError
from snapcore_keras import SnapshotEnsemble

X = np.linspace(-2, 2, 18, dtype=np.float32).reshape(6, 3)


def softmax64(logits):
    """The textbook formula in NumPy, float64."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def varied(model, number):
    """Give a model the weights of a member, and return them."""
    model.set_weights(
        [
            np.sin(3.0 * number + position + np.arange(weight.size)).reshape(weight.shape)
            for position, weight in enumerate(model.get_weights())
        ]
    )
    return model.get_weights()


def members_of(model, activation, count=2):
    """Members, and the mean of what the activation makes of the model's own outputs with the weights of each."""
    members, probabilities = [], []
    for number in range(count):
        members.append(varied(model, number))
        probabilities.append(activation(np.asarray(model(X, training=False), np.float64)))
    return members, np.mean(probabilities, 0)


def sequential(*, last=None):
    return keras.Sequential([keras.Input((3,)), layers.Dense(5, activation="relu"), last or layers.Dense(4)])


def called(model):
    model(X)
    return model


class Plain(keras.Model):
    """Whose `call` knows no `training`, and gives probabilities in a way that nothing tells."""

    def __init__(self):
        super().__init__()
        self.out = layers.Dense(4)

    def call(self, x):
        return ops.softmax(self.out(x))


CE, BCE = losses.CategoricalCrossentropy, losses.BinaryCrossentropy
LOSSES = {
    "sparse, logits": (losses.SparseCategoricalCrossentropy(from_logits=True), "softmax"),
    "categorical, logits": (CE(from_logits=True), "softmax"),
    "focal, logits": (losses.CategoricalFocalCrossentropy(from_logits=True), "softmax"),
    "binary, logits": (BCE(from_logits=True), "sigmoid"),
    "binary focal, logits": (losses.BinaryFocalCrossentropy(from_logits=True), "sigmoid"),
    "sparse": (losses.SparseCategoricalCrossentropy(), "identity"),
    "binary": (BCE(), "identity"),
    "by name": ("sparse_categorical_crossentropy", "identity"),
    "by the name of its class": ("BinaryCrossentropy", "identity"),
    "a function": (losses.categorical_crossentropy, "identity"),
    "in a list": ([BCE(from_logits=True)], "sigmoid"),
    "in a dict": ({"out": BCE(from_logits=True)}, "sigmoid"),
    "of values": ("mse", "values"),
    "of values, a class": (losses.Huber(), "values"),
    "of values, a function": (losses.mean_absolute_error, "values"),
}
BY_HAND = {"softmax": softmax64, "sigmoid": lambda z: 1 / (1 + np.exp(-z)), "identity": lambda p: p}
BY_HAND["values"] = BY_HAND["identity"]


@pytest.mark.parametrize("name", LOSSES)
def test_the_compiled_loss_says_what_the_outputs_are(name):
    loss, expected = LOSSES[name]
    inputs = keras.Input((3,))
    squash = {"identity": 0.1}.get(expected, 1.0)
    middle = {"identity": 0.5}.get(expected, 0.0)
    outputs = layers.Rescaling(squash, middle, name="out")(layers.Dense(4, activation="tanh")(inputs))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", loss)
    members, wanted = members_of(model, BY_HAND[expected])
    np.testing.assert_allclose(SnapshotEnsemble(members, model)(X), wanted, atol=1e-6)


def first(outputs):
    return outputs[0]


def test_losses_that_disagree_decide_nothing_unless_the_output_is_of_one():
    inputs = keras.Input((3,))
    heads = [layers.Dense(4, name=name)(inputs) for name in ("a", "b", "c")]
    for outputs, picks in ((heads, (0, 1, 2)), ({"a": heads[0], "b": heads[1], "c": heads[2]}, ("a", "b", "c"))):
        model = keras.Model(inputs, outputs)
        given = [BCE(from_logits=True), CE(from_logits=True), "mse"]
        model.compile("sgd", given if isinstance(outputs, list) else dict(zip("abc", given, strict=True)))
        with pytest.raises(
            DataError, match=r"loss does not say .* got BinaryCrossentropy, CategoricalCrossentropy, mse"
        ):
            SnapshotEnsemble([model.get_weights()], model, output=first)
        for pick, activation in zip(picks, ("sigmoid", "softmax", "values"), strict=True):
            found = SnapshotEnsemble([model.get_weights()], model, output=pick)(X)
            wanted = BY_HAND[activation](np.asarray(model(X)[pick], np.float64))
            np.testing.assert_allclose(found, wanted, atol=1e-6)


def own_loss(y, p):
    return ops.mean(p)


class OwnLoss(losses.Loss):
    def call(self, y, p):
        return ops.mean(p, -1)


@pytest.mark.parametrize(("loss", "name"), [(own_loss, "own_loss"), (OwnLoss(), "OwnLoss"), (losses.CTC(), "CTC")])
def test_a_loss_that_does_not_decide_is_refused_unless_the_last_layer_does(loss, name):
    model = sequential()
    model.compile("sgd", loss)
    given = [varied(model, 0)]
    with pytest.raises(DataError, match=rf"does not say what the outputs are, got {name}: pass activation='identity'"):
        SnapshotEnsemble(given, model)
    found = SnapshotEnsemble(given, model, activation="identity")(X)
    np.testing.assert_allclose(found, model(X), atol=1e-6)
    model = sequential(last=layers.Dense(4, activation="softmax"))
    model.compile("sgd", loss)
    given = [varied(model, 0)]
    np.testing.assert_allclose(SnapshotEnsemble(given, model)(X), model(X), atol=1e-6)


def test_a_loss_with_its_classes_along_another_axis_is_refused():
    model = sequential()
    model.compile("sgd", CE(from_logits=True, axis=1))
    with pytest.raises(DataError, match="classes along axis 1, not along the last: pass axis=1"):
        SnapshotEnsemble([model.get_weights()], model)
    found = SnapshotEnsemble([varied(model, 0)], model, axis=1)(X)
    np.testing.assert_allclose(found, softmax64(np.asarray(model(X), np.float64)), atol=1e-6)


def softmax_by_operation():
    inputs = keras.Input((3,))
    return keras.Model(inputs, ops.softmax(layers.Dense(4)(inputs)))


def softmax_within():
    inputs = keras.Input((3,))
    return keras.Model(inputs, sequential(last=layers.Dense(4, activation="softmax"))(inputs))


def softmax_at_every_time():
    each = layers.TimeDistributed(layers.Dense(4, activation="softmax"))
    return keras.Sequential([keras.Input((3,)), layers.Reshape((3, 1)), each])


ENDINGS = {
    "a dense layer's": lambda: sequential(last=layers.Dense(4, activation="softmax")),
    "sigmoid": lambda: sequential(last=layers.Dense(4, activation="sigmoid")),
    "an activation layer": lambda: keras.Sequential(
        [keras.Input((3,)), layers.Dense(4), layers.Activation("softmax", dtype="float32")]
    ),
    "a softmax layer": lambda: keras.Sequential([keras.Input((3,)), layers.Dense(4), layers.Softmax()]),
    "an operation": softmax_by_operation,
    "within a model": softmax_within,
    "at every time": softmax_at_every_time,
}


@pytest.mark.parametrize("name", ENDINGS)
def test_models_ending_in_softmax_are_noticed_at_the_first_use(name):
    model = ENDINGS[name]()
    members, wanted = members_of(model, lambda probabilities: probabilities)
    for activation in ("auto", "identity"):
        np.testing.assert_allclose(SnapshotEnsemble(members, model, activation=activation)(X), wanted, atol=1e-6)
    for activation in ("softmax", "sigmoid"):
        ensemble = SnapshotEnsemble(members, model, activation=activation)
        for _ in range(2):
            with pytest.raises(DataError, match=r"ends in s.*already are probabilities.*activation='identity'"):
                ensemble(X)


@pytest.mark.parametrize(("ending", "loss"), [("softmax", CE), ("sigmoid", BCE)])
def test_a_model_compiled_for_logits_that_ends_in_probabilities_is_refused(ending, loss):
    model = sequential(last=layers.Dense(4, activation=ending))
    model.compile("sgd", loss(from_logits=True))
    with pytest.raises(DataError, match="already are probabilities"):
        SnapshotEnsemble([model.get_weights()], model)(X)


@pytest.mark.parametrize("method", ["__call__", "members", "predict", "tune", "functional"])
@pytest.mark.parametrize("activation", ["auto", "softmax"])
def test_a_softmax_that_nothing_announces_is_noticed_on_the_first_batch(method, activation):
    model = called(Plain())
    ensemble = SnapshotEnsemble([model.get_weights()], model, activation=activation)
    for _ in range(2):
        with pytest.raises(DataError, match=r"already are probabilities.*pass activation='identity'"):
            getattr(ensemble, method)(X)
    same = SnapshotEnsemble([model.get_weights()], model, activation="identity")
    np.testing.assert_allclose(same(X), model(X), atol=1e-6)


def test_only_the_first_batch_is_looked_at():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4, use_bias=False)])
    ensemble = SnapshotEnsemble([[np.eye(4)]], model)
    ensemble(np.zeros((0, 4), np.float32))  # has nothing to see
    ensemble(np.full((2, 4), 2.0, np.float32))
    found = ensemble(np.full((2, 4), 0.25, np.float32))  # which do sum to 1, by chance
    np.testing.assert_allclose(found, np.full((2, 4), 0.25), atol=1e-6)


def test_outputs_that_the_loss_wrongly_takes_for_probabilities_are_refused():
    model = sequential()
    model.compile("sgd", "sparse_categorical_crossentropy")
    varied(model, 1)
    with pytest.raises(DataError, match=r"from_logits=False.*below 0 or above 1"):
        SnapshotEnsemble([model.get_weights()], model)(X)


def test_probabilities_in_half_precision_are_recognised():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(200, dtype="bfloat16")])
    outputs = SnapshotEnsemble([model.get_weights()], model, output=ops.softmax)
    with pytest.raises(DataError, match="already are probabilities"):
        outputs(X)


def test_the_activation_may_be_named_or_of_your_own():
    model = sequential()
    varied(model, 0)
    logits = np.asarray(model(X), np.float64)
    given = [model.get_weights()]
    for activation, wanted in {"softmax": softmax64, "sigmoid": BY_HAND["sigmoid"], "identity": lambda z: z}.items():
        found = SnapshotEnsemble(given, model, activation=activation)(X)
        np.testing.assert_allclose(found, wanted(logits), rtol=1e-5, atol=1e-6)
    found = SnapshotEnsemble(given, model, activation=lambda z: ops.softmax(z / 2))(X)
    np.testing.assert_allclose(found, softmax64(logits / 2), atol=1e-6)
    with pytest.raises(DataError, match=r"activation must be one of .*'auto'.* got 'relu'"):
        SnapshotEnsemble(given, model, activation="relu")


def untold(inputs, features):
    """A functional model that ends in softmax, which its last layer does not tell."""
    return keras.Model(inputs, layers.Rescaling(1.0)(ops.softmax(layers.Dense(4)(features))))


def of_numbers():
    inputs = keras.Input((3,))
    return untold(inputs, inputs)


def of_integers():
    inputs = keras.Input((5,), dtype="int32")
    return untold(inputs, layers.Flatten()(layers.Embedding(1, 3)(inputs)))  # which knows no number but 0


def of_any_size():
    inputs = keras.Input((None, None, 3))
    return untold(inputs, layers.GlobalAveragePooling2D()(layers.Conv2D(2, 5)(inputs)))


def of_several():
    inputs = {name: keras.Input((3,), name=name) for name in ("left", "right")}
    return untold(inputs, layers.Add()(list(inputs.values())))


@pytest.mark.parametrize("make", [of_numbers, of_integers, of_any_size, of_several])
def test_without_a_batch_probabilities_are_noticed_by_what_zeros_give(make):
    model = make()
    ensemble = SnapshotEnsemble([model.get_weights()], model)
    inputs = keras.tree.map_structure(lambda given: keras.Input(given.shape[1:], dtype=given.dtype), model.input)
    for ask in (ensemble.functional, lambda: ensemble(inputs)):
        with pytest.raises(DataError, match="already are probabilities"):
            ask()


def test_within_a_graph_of_the_callers_probabilities_are_noticed_by_what_zeros_give():
    model = called(Plain())
    ensemble = SnapshotEnsemble([model.get_weights()], model)
    for _ in range(2):
        with pytest.raises(DataError, match="already are probabilities"):
            tf.function(ensemble, autograph=False)(X)
    with pytest.raises(Exception, match="already are probabilities"):  # AutoGraph makes an error of its own of it
        tf.function(ensemble)(X)


@pytest.mark.parametrize("autograph", [True, False])
def test_it_may_be_called_within_a_graph_of_the_callers(autograph, caplog):
    model = sequential()
    members, wanted = members_of(model, softmax64)
    found = tf.function(SnapshotEnsemble(members, model), autograph=autograph)(X)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert caplog.text == ""


def test_zeros_are_run_once_and_the_first_batch_is_looked_at_after_them():
    runs = []

    class Counted(keras.Model):
        def call(self, x):
            runs.append(tf.executing_eagerly())
            return self.layers[0](x)

    inputs = keras.Input((4,))
    model = Counted()
    model.out = layers.Dense(4, use_bias=False)
    model(np.zeros((1, 4)))
    ensemble = SnapshotEnsemble([[np.eye(4)]], model)
    runs.clear()
    ensemble(inputs), ensemble(inputs)
    assert runs.count(True) == 1
    for _ in range(2):
        with pytest.raises(DataError, match="already are probabilities"):
            ensemble(np.full((2, 4), 0.25, np.float32))


def test_a_model_that_cannot_run_zeros_fails_by_its_own_error_and_with_the_cure():
    inputs = keras.Input((None, 3))
    model = keras.Model(inputs, layers.Dense(4)(layers.GlobalMaxPooling1D()(layers.Conv1D(4, 50)(inputs))))
    ensemble, x = SnapshotEnsemble([model.get_weights()], model), np.ones((2, 60, 3), np.float32)
    with pytest.raises(Exception, match="size would be negative") as caught:
        ensemble.functional()
    assert "on a batch of your own first" in caught.value.__notes__[0]
    found = ensemble(x)
    np.testing.assert_allclose(ensemble.functional()(x), found, atol=1e-6)


def test_zeros_that_are_all_masked_decide_nothing():
    inputs = keras.Input((5,), dtype="int32")
    words = layers.GlobalAveragePooling1D()(layers.Embedding(7, 3, mask_zero=True)(inputs))
    model = keras.Model(inputs, layers.Rescaling(1.0)(ops.softmax(layers.Dense(4)(words))))
    model.compile("sgd", "sparse_categorical_crossentropy")
    assert np.isnan(model(np.zeros((1, 5), np.int32))).all()
    x = np.arange(1, 6).reshape(1, 5)
    np.testing.assert_allclose(SnapshotEnsemble([model.get_weights()], model).functional()(x), model(x), atol=1e-6)


@pytest.mark.parametrize("activation", ["auto", "softmax"])
def test_softmax_of_one_output_is_refused_since_it_is_one_whatever_it_is(activation):
    model = sequential(last=layers.Dense(1))
    given = [varied(model, 1)]
    for method, arguments in (("__call__", (X,)), ("members", (X,)), ("predict", (X,)), ("functional", ())):
        with pytest.raises(DataError, match=r"softmax over one output is 1 .* activation='sigmoid'"):
            getattr(SnapshotEnsemble(given, model, activation=activation), method)(*arguments)
    wanted = BY_HAND["sigmoid"](np.asarray(model(X), np.float64))
    np.testing.assert_allclose(SnapshotEnsemble(given, model, activation="sigmoid")(X), wanted, atol=1e-6)
    model.compile("sgd", BCE(from_logits=True))
    np.testing.assert_allclose(SnapshotEnsemble(given, model)(X), wanted, atol=1e-6)
