"""TensorBoard: events of a run read back, and what the Embedding Projector is given."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from command_line import run_command
from google.protobuf import text_format
from hand_made import describe_by_hand, hand_made_classes
from PIL import Image
from small_network import network
from small_project import SIZE, TIMES, YEARS, make_project, settings
from small_runs import BrokenOffError, assert_same_run, last_state
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

from geomatch import project2d
from geomatch.data.embeddings import Embeddings
from geomatch.data.store import TileStore
from geomatch.data.tiles import SPLITS, TileTable
from geomatch.nn.encoder import Siamese, TileForm
from geomatch.nn.module_graph import trace
from geomatch.report import tensorboard
from geomatch.report.tensorboard import Board, write_projector
from geomatch.train import train
from geomatch.training import rounds
from geomatch.training.rounds import Examples, weights
from geomatch.training.sampler import Sampler

STILL = ("augment.brightness=0.0", "augment.contrast=0.0", "augment.label_dropout=0.0")


def events(folder):
    """All that events hold, as TensorBoard reads them."""
    everything = dict.fromkeys(("scalars", "histograms", "images"), 0)
    found = EventAccumulator(str(folder), size_guidance=everything)
    found.Reload()
    return found


def scalars(found):
    """{(name, step): value}; every step must come once."""
    values = {}
    for name in found.Tags()["scalars"]:
        for event in found.Scalars(name):
            assert (name, event.step) not in values
            values[name, event.step] = event.value
    return values


# Events of a run


def test_events_hold_the_metrics_of_a_run(trained):
    found = scalars(events(trained.project.run("run1") / "events"))
    wanted = {
        (name.replace("@", "_"), line["step"]): value
        for line in trained.metrics
        for name, value in line.items()
        if name != "step" and value is not None
    }
    speeds = {key for key in found if key[0] in TIMES}
    assert len(speeds) == 3 * len(TIMES)
    assert found.keys() - speeds == wanted.keys()
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-6)


def test_every_round_has_histograms_and_all_but_the_last_a_batch(trained):
    found = events(trained.project.run("run1") / "events")
    names = found.Tags()["histograms"]
    assert {"weights/trunk/kernel", "weights/trunk/scale", "weights/pair_head/bias"} <= {*names}
    for name in names:
        assert [event.step for event in found.Histograms(name)] == [0, 6, 12, 18]
    _, state = last_state(trained.project)
    for kind in ("scale", "kernel"):
        leaves = [
            leaf.reshape(-1)
            for keys, leaf in jax.tree_util.tree_leaves_with_path(state.params["encoder"]["trunk"])
            if keys[-1].key == kind
        ]
        own = np.concatenate(leaves).astype(float)
        last = found.Histograms(f"weights/trunk/{kind}")[-1].histogram_value
        if kind == "scale":
            assert (last.num, last.min, last.max) == (len(own), own.min(), own.max())
        # Of a trunk's kernels, many are drawn.
        spread = {"scale": 1e-6, "kernel": 0.1}[kind]
        assert last.sum_squares / last.num == pytest.approx(np.mean(own**2), rel=spread)
    pictures = found.Images("batch")
    assert [event.step for event in pictures] == [0, 6, 12]
    # Hard pairs come beside the others once they were mined.
    assert pictures[0].width < pictures[1].width == pictures[2].width
    assert len({event.encoded_image_string for event in pictures}) == 3


def test_the_graph_of_a_run_is_there(trained):
    graph = events(trained.project.run("run1") / "events").Graph()
    names = {node.name for node in graph.node}
    assert {"encoder/trunk/stem/kernel", "pair_head/kernel", "tiles"} <= names
    assert all({*node.input} <= names for node in graph.node)


def test_what_a_broken_run_left_past_its_checkpoint_is_hidden(tiled, trained, copied, monkeypatch):
    project = copied(tiled)
    real, mined = rounds.mining.hard_queries, []

    def fail_the_second_time(*arguments):
        mined.append(0)
        if len(mined) > 1:
            raise BrokenOffError
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(rounds.mining, "hard_queries", fail_the_second_time)
        with pytest.raises(BrokenOffError):
            train(project, settings())
    assert last_state(project)[0] == 6
    folder = project.run("run1") / "events"
    assert ("train/loss", 12) in scalars(events(folder))
    Board(folder, 7).close()
    assert {step for _, step in scalars(events(folder))} == {0, 6}
    train(project, settings())
    found, wanted = events(folder), events(trained.project.run("run1") / "events")
    mine, whole = (
        {key: value for key, value in scalars(e).items() if key[0] not in TIMES}
        for e in (found, wanted)
    )
    assert mine == whole
    for name in wanted.Tags()["histograms"]:
        of_both = [
            [(e.step, e.histogram_value) for e in read.Histograms(name)] for read in (found, wanted)
        ]
        assert of_both[0] == of_both[1]
    of_both = [
        [(e.step, e.encoded_image_string) for e in read.Images("batch")] for read in (found, wanted)
    ]
    assert of_both[0] == of_both[1]


def test_a_run_learns_the_same_whether_it_is_shown_or_not(tiled, trained, copied, monkeypatch):
    project = copied(tiled)
    for name in ("histograms", "pictures", "graph"):
        monkeypatch.setattr(Board, name, lambda *_: None)
    monkeypatch.setattr(Examples, "rows", lambda *_: [])
    train(project, settings())
    assert_same_run(project, "run1", trained.project, "run1")


def test_values_of_nan_have_no_histogram(tmp_path):
    written = Board(tmp_path, 0)
    written.histograms(3, {"some": np.array([1, np.nan, 2]), "none": np.array([1e38, np.inf])})
    written.scalars(3, {"unknown": None, "known": 0.5})
    written.close()
    found = events(tmp_path)
    assert found.Tags()["histograms"] == ["some"]
    (event,) = found.Histograms("some")
    assert (event.histogram_value.num, event.histogram_value.sum) == (2, 3)
    assert scalars(found) == {("known", 3): 0.5}


def test_weights_are_grouped_by_part_and_kind(monkeypatch):
    rng = np.random.default_rng(0)
    trunk = {
        "conv1": {"kernel": rng.normal(size=(3, 3, 2, 4)), "bias": np.zeros(4)},
        "conv2": {"kernel": rng.normal(size=(1, 4))},
    }
    params = {"encoder": {"trunk": trunk, "head": {"kernel": np.ones((2, 2))}}, "heat": np.ones(())}
    found = weights(params)
    assert {name: len(values) for name, values in found.items()} == {
        "weights/trunk/kernel": 76,
        "weights/trunk/bias": 4,
        "weights/head/kernel": 4,
        "weights/heat": 1,
    }
    kernels = np.concatenate([trunk[name]["kernel"].reshape(-1) for name in trunk])
    np.testing.assert_array_equal(found["weights/trunk/kernel"], kernels)
    monkeypatch.setattr(rounds, "WEIGHTS", 38)
    drawn = weights(params)["weights/trunk/kernel"]
    assert len(drawn) == 38
    # Half of each array.
    assert np.isin(drawn, trunk["conv1"]["kernel"]).sum() == 36
    assert np.isin(drawn, kernels).all()


# Pictures of what is learnt from


def symmetries(tile):
    """A tile, flipped and turned."""
    return [np.rot90(t, turns) for t in (tile, tile[:, ::-1]) for turns in range(4)]


def examples_of(project, *overrides, step=0, mined=None):
    """Rows of thumbnails, and the training tiles."""
    wanted = settings(*STILL, *overrides)
    tiles = TileTable.load(project.catalogue)
    tiles = tiles.select(tiles.split == SPLITS.index("train"))
    channels = project.tile_manifest().channels
    form = TileForm(SIZE, channels.image, channels.label)
    sampler = Sampler(tiles, wanted.train, wanted.mining)
    rows = sampler.draw(step, mined)
    pixels = TileStore.open(project.pixels).read(tiles.store_row[rows.reshape(-1)])
    place = np.stack([tiles.epsg, tiles.col, tiles.row, tiles.year], axis=1)[rows]
    batch = pixels.reshape(*rows.shape, *pixels.shape[1:]), place.astype(np.int32)
    return Examples(sampler, wanted, form).rows(step, mined, *batch), tiles


@pytest.mark.parametrize("labels", [False, True])
def test_a_picture_shows_anchors_as_they_are_learnt_from(tmp_path, tiled, labels):
    project = make_project(tmp_path / "project", tiled.imagery, labels=labels)
    shown, tiles = examples_of(project, "train.batch=6")
    assert len(shown) == 4 * (1 + labels)
    row_of = dict(zip(tiles.ids(), tiles.store_row, strict=True))
    store = TileStore.open(project.pixels)
    turns = []
    for i in range(0, len(shown), 1 + labels):
        images = shown[i]
        assert [t.caption[0] for t in images] == ["anchor", "positive", "negative"]
        assert [t.right for t in images] == [None, True, False]
        (place, year), (near, other), (far, third) = (t.caption[1].split("@") for t in images)
        assert (near, other) == (place, next(y for y in YEARS if y != year))
        assert far != place
        assert third == other
        picked = []
        for column, thumbnail in enumerate(images):
            whole = store.read(np.array([row_of[thumbnail.caption[1]]]))[0]
            alike = [
                k
                for k, tile in enumerate(symmetries(whole))
                if (tile[..., :3] == thumbnail.pixels).all()
                and (not labels or (tile[..., 3:] == shown[i + 1][column].pixels).all())
            ]
            assert alike
            picked.append(alike)
        # The two years of a place are turned alike.
        assert {*picked[0]} & {*picked[1]}
        turns += picked
    assert len({tuple(alike) for alike in turns}) > 1


def test_a_whole_batch_shows_all_views_of_a_place(tiled):
    shown, _ = examples_of(tiled.project, "train.loss=infonce", "train.views=3", "train.batch=2")
    assert len(shown) == 2
    for row in shown:
        assert [t.caption[0] for t in row] == ["anchor", "positive", "positive"]
        assert len({t.caption[1].split("@")[0] for t in row}) == 1


def test_hard_tiles_are_named_as_such(trained):
    files = sorted((trained.project.run("run1") / "mining").iterdir())
    mined = rounds.Mined.load(files[0])
    shown, _ = examples_of(trained.project, step=6, mined=mined)
    names = [
        f"{hard}{name}" for hard in ("", "hard ") for name in ("anchor", "positive", "negative")
    ]
    assert all([t.caption[0] for t in row] == names for row in shown)
    for row in shown:
        hard, match, wrong = (t.caption[1].split("@") for t in row[3:])
        assert hard[0] == match[0] != wrong[0]


def test_codes_of_classes_are_seen_in_pictures(tmp_path, tiled, monkeypatch):
    project = make_project(tmp_path / "project", tiled.imagery, labels=True)
    real = TileStore.read
    monkeypatch.setattr(
        TileStore,
        "read",
        lambda store, rows: np.where(np.arange(4) < 3, real(store, rows), 5).astype(np.uint8),
    )
    shown, _ = examples_of(project, "model.label_classes=8")
    assert {int(t.pixels.max()) for t in shown[1]} == {5 * 31}


# The operations of a network


@pytest.mark.parametrize("model", [{"head": "conv"}, {"head": "mlp"}, {"head": "pca"}])
def test_the_module_graph_leads_from_tiles_to_the_answer(model):
    form = TileForm(32, 3, 1)
    siamese, variables = network(form, trunk="resnet10", **model)

    def forward(variables, tiles):
        return siamese.apply(variables, tiles, method=Siamese.encode_and_pair)

    nodes = trace(forward, variables, (32, 32, 4))
    by_name = {node.name: node for node in nodes}
    assert len(by_name) == len(nodes)
    used, waiting = set(), [nodes[-1].name]
    while waiting:
        name = waiting.pop()
        if name not in used:
            used.add(name)
            waiting += by_name[name].inputs
    assert "tiles" in used
    assert nodes[-1].shape == (1,)
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    for keys, leaf in leaves:
        name = "/".join(key.key for key in keys)
        assert by_name[name].shape == leaf.shape
        assert (name in used) == (name != "log_temperature")
    parts = {"/".join(name.split("/")[:2]) for name in used if "/" in name}
    assert {"encoder/fusion", "encoder/trunk", "encoder/head"} <= parts
    assert not any("Siamese" in name or "." in name for name in by_name)
    # A convolution is within its layer.
    assert by_name["encoder/trunk/stem/kernel"].operation == "Variable"
    stem = [n for n in nodes if n.name.startswith("encoder/trunk/stem/conv")]
    assert [node.operation for node in stem] == ["conv_general_dilated"]


# The Embedding Projector


def read_projector(folder):
    """(name, vectors, rows of metadata, sprite, side of a picture) by way of the configuration."""
    text = (folder / "projector_config.pbtxt").read_text()
    (found,) = text_format.Parse(text, ProjectorConfig()).embeddings
    vectors = np.loadtxt(folder / found.tensor_path, delimiter="\t", ndmin=2)
    lines = (folder / found.metadata_path).read_text(encoding="utf-8").splitlines()
    with Image.open(folder / found.sprite.image_path) as image:
        sprite = np.asarray(image.convert("RGB"))
    width, height = found.sprite.single_image_dim
    assert width == height
    return found.tensor_name, vectors, [line.split("\t") for line in lines], sprite, width


def cell(sprite, side, i):
    """The picture of tile `i`, as the projector cuts it: row by row."""
    row, column = divmod(i, sprite.shape[1] // side)
    return sprite[row * side : (row + 1) * side, column * side : (column + 1) * side]


def test_the_projector_is_given_every_tile(tiled, copied):
    project, tiles = copied(tiled), tiled.tiles
    vectors = np.random.default_rng(0).normal(size=(88, 6)).astype(np.float32)
    describe_by_hand(project, vectors)
    result = run_command("project2d", "-p", str(project.root), "--projector")
    assert result.exit_code == 0, result.output
    folder = project.reports / "hand@1" / "projector"
    assert str(folder) in result.stderr.replace("\n", "")
    name, found, (header, *rows), sprite, side = read_projector(folder)
    assert name == "hand@1"
    described = Embeddings.load(project.embeddings / "hand@1.parquet").vectors
    np.testing.assert_allclose(found, described, rtol=1e-6)
    assert header == ["id", "place", "year", "split"]
    splits = [SPLITS[code] for code in tiles.split]
    years = [tiles.years[code] for code in tiles.year]
    wanted = zip(tiles.ids(), tiles.cells(), years, splits, strict=True)
    assert rows == [list(row) for row in wanted]
    assert sprite.shape[0] == sprite.shape[1] == 10 * side
    pixels = TileStore.open(project.pixels).read(tiles.store_row)
    for i, tile in enumerate(pixels):
        quarters = tile.reshape(4, SIZE // 4, 4, SIZE // 4, 3).mean(axis=(1, 3))
        drawn = cell(sprite, side, i).reshape(4, side // 4, 4, side // 4, 3).mean(axis=(1, 3))
        assert np.abs(quarters - drawn).max() < 25
        assert np.abs(tile.mean(axis=(0, 1)) - drawn.mean(axis=(0, 1))).max() < 1
    # TensorBoard finds folders by their events.
    assert list(folder.glob("events.*"))


def test_of_many_tiles_the_projector_is_given_a_sample(tiled, copied, monkeypatch):
    project = copied(tiled)
    describe_by_hand(project, np.arange(88.0)[:, None] + np.zeros((88, 3)))
    monkeypatch.setattr(project2d, "PROJECTED", 10)
    folder = project2d.projector(project)
    before = {
        path.name: path.read_bytes() for path in folder.iterdir() if "events" not in path.name
    }
    _, vectors, (_, *rows), sprite, side = read_projector(folder)
    assert vectors.shape == (10, 3)
    assert len({*vectors[:, 0]}) == 10
    assert len({row[3] for row in rows}) > 1
    assert [row[0] for row in rows] == [tiled.tiles.ids()[int(v)] for v in vectors[:, 0]]
    assert sprite.shape[0] == 4 * side
    # Again, in place of the old one: the same tiles.
    assert project2d.projector(project) == folder
    for name, content in before.items():
        assert (folder / name).read_bytes() == content
    assert len([*folder.iterdir()]) == len(before) + 1
    assert [path.name for path in folder.parent.iterdir()] == ["projector"]


def test_a_sprite_stays_within_what_a_browser_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard, "SPRITE", 100)
    grey = [np.full((8, 8, 1), 20 * i, np.uint8) for i in range(10)]
    names = [f"class\t{i}" for i in range(10)]
    write_projector(tmp_path, "many", np.eye(10), {"id": names, "class": ["a"] * 10}, grey)
    _, vectors, (_, *rows), sprite, side = read_projector(tmp_path)
    assert (side, sprite.shape) == (25, (100, 100, 3))
    assert [row[0] for row in rows] == [f"class {i}" for i in range(10)]
    np.testing.assert_array_equal(vectors, np.eye(10))
    for i in range(10):
        assert (cell(sprite, side, i) == 20 * i).all()


def test_images_without_years_have_their_class(tiled, copied, monkeypatch):
    project = copied(tiled)
    describe_by_hand(project, np.zeros((88, 2)))
    described = Embeddings.load(project.embeddings / "hand@1.parquet")
    classes = hand_made_classes([0, 1] * 44)
    monkeypatch.setattr(project2d, "_load", lambda *_: ("hand@1", described, classes))
    _, _, (header, *rows), _, _ = read_projector(project2d.projector(project))
    assert header == ["id", "class", "split"]
    assert [row[1] for row in rows[:3]] == ["a", "b", "a"]
    assert rows[1][0] == "b/1.png"
