import random
from pathlib import Path
from urllib.error import URLError

import huggingface_hub
import pytest
import timm
import torch
from image_cases import as_tar, spoil, write_classes, write_images
from PIL import Image

from tpvprune.images.loading import choose_images, in_memory
from tpvprune.images.preprocessing import resolve_preprocessing
from tpvprune.images.sources import open_images
from tpvprune.passes.batches import unlabeled
from tpvprune.saved.models import load_model, read_checkpoint

INPUTS = torch.arange(24.0).reshape(6, 4)


@pytest.fixture(scope="module")
def model():
    return timm.create_model("test_resnet", num_classes=10)


@pytest.fixture(scope="module")
def preprocessing(model):
    return resolve_preprocessing(model, input_size=(3, 16, 16), crop_pct=1.0)


def choose(source, preprocessing, num_images=None, **options):
    options = {"batch_size": 5, "workers": 2} | options
    return choose_images(source, preprocessing, num_images=num_images, **options)


class TestUnlabeled:
    def test_labels_are_dropped_unread(self):
        class Poison:
            def __getattribute__(self, name):
                raise AssertionError("a label was read")

        batches = unlabeled([(INPUTS, Poison()), [INPUTS, Poison()], INPUTS])
        assert all(torch.equal(x, INPUTS) for x in batches)
        assert len(batches) == 3

    def test_unlabeled_twice_is_unlabeled_once(self):
        source = [INPUTS]
        once = unlabeled(source, dtype=torch.float64, seed=3)
        twice = unlabeled(once)
        assert twice.batches is source
        assert (twice.device, twice.dtype, twice.seed) == (None, torch.float64, 3)
        assert unlabeled(once, dtype=torch.float32, seed=0).seed == 0

    def test_dtype_follows(self):
        (x,) = unlabeled([INPUTS], dtype=torch.float64)
        assert x.dtype == torch.float64

    def test_shuffling_loader_repeats_and_leaves_the_caller_alone(self):
        data = torch.utils.data.TensorDataset(INPUTS, torch.arange(6))
        loader = torch.utils.data.DataLoader(data, batch_size=2, shuffle=True)
        before = torch.get_rng_state(), random.getstate()
        batches = unlabeled(loader)
        first, second = torch.cat(list(batches)), torch.cat(list(batches))
        assert torch.equal(first, second)
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]

    def test_random_batches_differ_within_a_pass(self):
        class Noise:
            def __iter__(self):
                yield from (torch.rand(2) for _ in range(2))

        first, second = unlabeled(Noise())
        assert not torch.equal(first, second)

    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            ((x for x in [INPUTS]), "re-iterable.*list"),
            (INPUTS, "wrap a single batch in a list"),
            (
                torch.utils.data.TensorDataset(INPUTS),
                "found TensorDataset: pass a DataLoader of it",
            ),
            ({"x": INPUTS}, "found dict"),
            (3, "found int"),
        ],
    )
    def test_what_cannot_be_iterated_again_is_refused(self, batches, message):
        with pytest.raises(ValueError, match=message):
            unlabeled(batches)

    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            ([], "found none"),
            ([INPUTS, "text"], "found str in batch 1"),
            ([INPUTS.long()], r"torch.int64 in batch 0"),
            ([INPUTS[:0]], r"found shape \(0, 4\)"),
            ([INPUTS / 0], "NaN or infinity in batch 0"),
        ],
    )
    def test_bad_batches_are_named(self, batches, message):
        with pytest.raises(ValueError, match=message):
            list(unlabeled(batches))


class TestPreprocessing:
    def test_pretrained_cfg_decides(self, model):
        found = resolve_preprocessing(model)
        assert found.input_size == model.pretrained_cfg["input_size"]
        assert found.config["mean"] == model.pretrained_cfg["mean"]

    def test_overrides_win(self, model):
        found = resolve_preprocessing(
            model,
            input_size=(3, 8, 8),
            mean=[0.25],
            std=[0.5],
            crop_pct=1.0,
            interpolation="nearest",
        )
        white = found.transform(Image.new("RGB", (8, 8), "white"))
        assert white.shape == (3, 8, 8)
        assert torch.allclose(white, torch.tensor(1.5))

    def test_grey_takes_the_mean_of_the_colours(self, model):
        found = resolve_preprocessing(model, input_size=(1, 8, 8))
        assert found.config["mean"] == pytest.approx((sum(model.pretrained_cfg["mean"]) / 3,))

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"mean": (0.1, 0.2)}, "mean: expected 1 or 3 values, found 2"),
            ({"std": (0.0,)}, "std: expected values above 0"),
            ({"crop_pct": 2.0}, "crop_pct: expected"),
            ({"interpolation": "magic"}, "interpolation: expected one of nearest"),
            ({"input_size": (5, 8, 8)}, "expected 1 or 3 channels, found 5"),
        ],
    )
    def test_bad_overrides_are_named(self, model, overrides, message):
        with pytest.raises(ValueError, match=message):
            resolve_preprocessing(model, **overrides)


class TestChoice:
    def test_flat_folder_gives_every_image(self, tmp_path, preprocessing):
        source = open_images(write_images(tmp_path / "flat"))
        batches = choose(source, preprocessing)
        assert [x.shape for x in batches] == [(5, 3, 16, 16), (5, 3, 16, 16), (2, 3, 16, 16)]
        assert len(batches) == 3

    def test_pixels_are_those_of_the_file(self, tmp_path, model):
        folder = write_images(tmp_path / "flat", 1, size=8)
        same = resolve_preprocessing(
            model, input_size=(3, 8, 8), mean=[0], std=[1], crop_pct=1.0, interpolation="nearest"
        )
        (x,) = choose(open_images(folder), same)
        image = Image.open(folder / "0000.png")
        expected = torch.tensor(list(image.tobytes())).reshape(8, 8, 3).permute(2, 0, 1) / 255
        assert torch.allclose(x[0], expected)

    def test_seed_decides(self, tmp_path, preprocessing):
        source = open_images(write_images(tmp_path / "flat"))

        def chosen(seed):
            return torch.cat(list(choose(source, preprocessing, 7, seed=seed)))

        assert torch.equal(chosen(0), chosen(0))
        assert not torch.equal(chosen(0), chosen(1))

    def test_number_of_threads_does_not_matter(self, tmp_path, preprocessing):
        source = open_images(write_images(tmp_path / "flat"))
        one, many = (torch.cat(list(choose(source, preprocessing, 12, workers=n))) for n in (1, 4))
        assert torch.equal(one, many)

    def test_neighbouring_ranges_are_disjoint_and_cover(self, tmp_path, preprocessing):
        source = open_images(write_images(tmp_path / "flat"))
        parts = [choose(source, preprocessing, 6, skip=skip) for skip in (0, 6)]
        rows = torch.cat([x.flatten(1) for part in parts for x in part])
        assert len(rows.unique(dim=0)) == 12

    def test_more_than_there_are_gives_all(self, tmp_path, preprocessing):
        source = open_images(write_images(tmp_path / "flat"))
        assert choose(source, preprocessing, 100).total == 12

    def test_tar_equals_folder(self, tmp_path, preprocessing):
        folder = write_classes(tmp_path / "classes", ["cat", "dog"])
        tar = as_tar(folder, tmp_path / "classes.tar")
        a, b = (
            list(choose(open_images(p, labelled=True), preprocessing, labelled=True))
            for p in (folder, tar)
        )
        for (x, y), (u, v) in zip(a, b, strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)

    def test_class_folders_are_labels_in_order(self, tmp_path, preprocessing):
        source = open_images(write_classes(tmp_path, ["b", "a", "c"], 2), labelled=True)
        labels = torch.cat([y for _, y in choose(source, preprocessing, labelled=True)])
        assert labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert source.num_classes == 3

    def test_class_map_gives_the_indices(self, tmp_path, preprocessing):
        folder = write_classes(tmp_path / "data", ["a", "b"], 1)
        mapping = tmp_path / "map.txt"
        mapping.write_text("x\nb\na\n")
        source = open_images(folder, class_map=str(mapping), labelled=True)
        labels = torch.cat([y for _, y in choose(source, preprocessing, labelled=True)])
        assert labels.tolist() == [2, 1]

    def test_split_subfolder_is_used(self, tmp_path):
        write_images(tmp_path / "train", 3)
        write_images(tmp_path / "val", 2)
        assert open_images(tmp_path, split="train").count == 3
        assert open_images(tmp_path, split="validation").count == 2

    def test_unlabeled_batches_never_carry_targets(self, tmp_path, preprocessing):
        source = open_images(write_classes(tmp_path, ["a", "b"]))
        assert all(isinstance(x, torch.Tensor) for x in choose(source, preprocessing))

    def test_in_memory_holds_small_sets_only(self, tmp_path, preprocessing, monkeypatch):
        batches = choose(open_images(write_images(tmp_path)), preprocessing)
        assert isinstance(in_memory(batches), list)
        monkeypatch.setattr("tpvprune.images.loading.HELD_BYTES", 100)
        assert in_memory(batches) is batches

    @pytest.mark.parametrize("options", [{"num_images": 0}, {"batch_size": 0}])
    def test_nothing_to_choose_is_refused(self, tmp_path, preprocessing, options):
        source = open_images(write_images(tmp_path))
        with pytest.raises(ValueError, match="at least 1"):
            choose(source, preprocessing, **options)


class TestUndecodable:
    def test_up_to_one_percent_is_skipped_and_counted(self, tmp_path, preprocessing):
        folder = write_images(tmp_path, 200, size=4)
        for i in (3, 77):
            spoil(folder / f"{i:04d}.png")
        batches = choose(open_images(folder), preprocessing)
        assert sum(len(x) for x in batches) == 198
        assert batches.skipped == 2
        assert "0003.png" in batches.first_skipped

    def test_above_one_percent_is_an_error_with_an_example(self, tmp_path, preprocessing):
        folder = write_images(tmp_path, 199, size=4)
        for i in (3, 77):
            spoil(folder / f"{i:04d}.png")
        with pytest.raises(ValueError, match=r"2 of 199 images cannot be decoded.*0003\.png"):
            list(choose(open_images(folder), preprocessing))

    def test_text_that_calls_itself_an_image_is_counted_too(self, tmp_path, preprocessing):
        (tmp_path / "a.png").write_text("no image")
        with pytest.raises(ValueError, match=r"1 of 1 images.*first: a\.png\)"):
            list(choose(open_images(tmp_path), preprocessing))


class TestSources:
    def test_missing_empty_and_wrong_places_are_named(self, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "text.txt").write_text("x")
        (tmp_path / "broken.tar").write_bytes(b"x" * 2000)
        as_tar(tmp_path / "empty", tmp_path / "empty.tar")
        for name, message in [
            ("none", "no such folder or file"),
            ("empty", r"expected images \(.png.*found none"),
            ("text.txt", "expected a folder or an uncompressed .tar"),
            ("broken.tar", "not a readable tar"),
            ("empty.tar", "expected images"),
        ]:
            with pytest.raises(ValueError, match=message):
                open_images(tmp_path / name)

    def test_unreadable_folder_is_named(self, tmp_path, monkeypatch):
        write_images(tmp_path)
        monkeypatch.setattr("os.access", lambda *_: False)
        with pytest.raises(ValueError, match="cannot be read: check its permissions"):
            open_images(tmp_path)

    def test_labels_need_class_folders(self, tmp_path):
        with pytest.raises(ValueError, match="one subfolder per class"):
            open_images(write_images(tmp_path), labelled=True)

    def test_no_location_is_refused(self):
        with pytest.raises(ValueError, match="expected a folder"):
            open_images()

    def test_datasets_by_name(self, tmp_path, preprocessing):
        write_classes(tmp_path / "train", ["a", "b"])
        source = open_images(tmp_path, dataset="torch/image_folder", split="train", labelled=True)
        labels = torch.cat([y for _, y in choose(source, preprocessing, labelled=True)])
        assert labels.tolist() == [0] * 4 + [1] * 4

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("torch/cifar10", "its files are not there: --dataset-download fetches them"),
            ("torch/nonsense", "cannot be opened"),
        ],
    )
    def test_datasets_that_are_not_there_are_named(self, tmp_path, name, message):
        with pytest.raises(ValueError, match=f"{name} in .*: {message}"):
            open_images(tmp_path, dataset=name)

    @pytest.mark.parametrize("prefix", ["hfds", "hfids", "tfds", "wds"])
    def test_missing_packages_are_said_once(self, tmp_path, prefix, capsys, monkeypatch):
        def create(*_, **__):
            print("Please install something")
            raise RuntimeError("no such package")

        monkeypatch.setattr("timm.data.create_dataset", create)
        monkeypatch.setattr("tpvprune.images.sources.find_spec", lambda _: None)
        with pytest.raises(ValueError, match=f"{prefix}/x in .*not installed here: pip install "):
            open_images(tmp_path, dataset=f"{prefix}/x")
        assert capsys.readouterr() == ("", "")

    @pytest.mark.parametrize("name", ["cifra", "folder", "trch/cifar10", "torch/", "/cifar10"])
    def test_datasets_of_no_known_kind_are_refused(self, tmp_path, name):
        write_images(tmp_path)
        with pytest.raises(ValueError, match=f"begins with one of torch/.*, found '{name}'"):
            open_images(tmp_path, dataset=name)

    def test_a_dataset_of_torchvision_needs_its_folder(self):
        with pytest.raises(ValueError, match=r"torch/mnist: expected the folder .*--data-dir"):
            open_images(dataset="torch/mnist")

    @pytest.mark.parametrize("there", [True, False])
    def test_failed_downloads_leave_no_empty_folders(self, tmp_path, there, monkeypatch):
        root = tmp_path / "a" / "b"
        if there:
            (root / "mine").mkdir(parents=True)

        def create(*_, root, **__):
            Path(root, "raw", "deep").mkdir(parents=True)
            raise URLError("no network")

        monkeypatch.setattr("timm.data.create_dataset", create)
        with pytest.raises(ValueError, match=r"cannot be downloaded \(no network\)"):
            open_images(root, dataset="torch/mnist", download=True)
        left = [tmp_path / "a", root, root / "mine"] if there else []
        assert sorted(tmp_path.rglob("*")) == left

    def test_streams_are_read_in_order(self, preprocessing, monkeypatch):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                yield from ((Image.new("RGB", (4, 4), (i, 0, 0)), i) for i in range(9))

        monkeypatch.setattr("timm.data.create_dataset", lambda *_, **__: Stream())
        source = open_images(dataset="wds/anything", labelled=True)
        first = choose(source, preprocessing, 5, labelled=True)
        rest = choose(source, preprocessing, 9, skip=5, labelled=True)
        assert [y.tolist() for _, y in first] == [[0, 1, 2, 3, 4]]
        assert [y.tolist() for _, y in rest] == [[5, 6, 7, 8]]


class TestModels:
    def test_number_of_classes_comes_from_the_checkpoint(self, tmp_path, model):
        path = tmp_path / "weights.pt"
        torch.save({"state_dict": model.state_dict(), "epoch": 3}, path)
        loaded, made = load_model("test_resnet", checkpoint=path)
        assert made.kwargs == {"num_classes": 10}
        assert made.weights == str(path)
        assert torch.equal(loaded.fc.weight, model.fc.weight)
        assert not loaded.training

    def test_counters_may_be_missing(self, tmp_path, model):
        state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
        torch.save(state, tmp_path / "weights.pt")
        loaded, _ = load_model("test_resnet", checkpoint=tmp_path / "weights.pt")
        assert torch.equal(loaded.fc.weight, model.fc.weight)

    def test_random_weights_follow_the_seed_and_leave_the_callers_state(self):
        state = torch.get_rng_state()
        a, b, c = (load_model("test_resnet", seed=s)[0].fc.weight for s in (0, 0, 1))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert torch.equal(torch.get_rng_state(), state)

    def test_cifar_models_are_known(self):
        _, made = load_model("cifar_resnet20")
        assert made.name == "cifar_resnet20"

    def test_size_is_passed_to_models_built_for_one(self):
        loaded, made = load_model("test_vit", input_size=(3, 32, 32))
        assert made.kwargs == {"img_size": (32, 32)}
        assert loaded(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)

    def test_unknown_model_gets_close_matches(self):
        with pytest.raises(
            ValueError, match=r"unknown model 'resnet19': did you mean resnet10t|resnet18"
        ):
            load_model("resnet19")
        with pytest.raises(ValueError, match=r"did you mean torchvision/resnet18\?$"):
            load_model("torchvison/resnet18")

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("test_resnet", {"model_kwargs": {"foo": 1}}, "cannot be built.*foo"),
            ("local-dir:/none", {}, "expected /none/config.json of timm, found none"),
            ("resnet18.nonsense", {"pretrained": True}, "Invalid pretrained tag"),
            ("test_resnet", {"checkpoint": "/none"}, "/none: no such checkpoint file"),
            ("test_resnet", {"checkpoint": "/none", "pretrained": True}, "found both"),
        ],
    )
    def test_what_cannot_be_built_is_named(self, name, options, message):
        with pytest.raises(ValueError, match=message):
            load_model(name, **options)

    @pytest.mark.parametrize("name", ["resnet18", "hf-hub:timm/resnet18.a1_in1k"])
    def test_no_network_is_said_at_once(self, name, tmp_path, monkeypatch):
        def unreachable(*_):
            raise OSError("Name or service not known")

        monkeypatch.setattr("socket.getaddrinfo", unreachable)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.delenv(proxy, raising=False)
        with pytest.raises(ValueError, match=r"not in the local cache, and the hub cannot be"):
            load_model(name, pretrained=True)
        # Nothing of it stays for other libraries, or for when the network is back.
        assert huggingface_hub.constants.HF_HUB_OFFLINE is False

    def test_mismatch_names_keys_and_shapes(self, tmp_path, model):
        state = dict(model.state_dict())
        state["surplus.weight"] = state.pop("conv1.0.weight")
        torch.save(state, tmp_path / "weights.pt")
        with pytest.raises(
            ValueError,
            match=r"lacks conv1\.0\.weight; has unknown surplus\.weight; has shape "
            r"fc\.weight \(10, \d+\) instead of \(7, \d+\)",
        ):
            load_model("test_resnet", checkpoint=tmp_path / "weights.pt", num_classes=7)

    def test_a_checkpoint_of_another_network_is_said_to_be_so(self, tmp_path, model):
        torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "weights.pt")
        with pytest.raises(ValueError, match=r"0 of \d+ tensors do: is it another network's\?"):
            load_model("test_resnet", checkpoint=tmp_path / "weights.pt")
        state = {**model.state_dict(), "surplus": torch.zeros(1)}
        torch.save(state, tmp_path / "weights.pt")
        with pytest.raises(ValueError, match="does not fit the model: has unknown surplus"):
            load_model("test_resnet", checkpoint=tmp_path / "weights.pt")

    def test_pickled_code_is_not_run(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (open, (str(tmp_path / "exploded"), "w"))

        torch.save({"state_dict": Bomb()}, tmp_path / "weights.pt")
        with pytest.raises(ValueError, match="found a pickle of more than weights"):
            read_checkpoint(tmp_path / "weights.pt")
        assert not (tmp_path / "exploded").exists()

    @pytest.mark.parametrize(
        ("content", "found"),
        [
            (b"", "an empty file"),
            (b"no checkpoint\nat all", "a text file: it begins with 'no checkpoint'$"),
            ("é".encode() * 300 + b"x", "a text file: it begins with 'éé"),
            (b"<!DOCTYPE html>", "a text file: it begins with '<!DOCTYPE html>'"),
            (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
            (b"PK\x03\x04" + bytes(99), "damage"),
        ],
    )
    def test_what_is_no_checkpoint_is_called_what_it_is(self, tmp_path, content, found):
        expected = "expected a safetensors file or a torch checkpoint of weights, found "
        for name in ("a.safetensors", "a.pt"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=expected + found) as caught:
                read_checkpoint(tmp_path / name)
            assert "\n" not in str(caught.value)
        (tmp_path / "a.pt").write_bytes(bytes(range(256)))
        with pytest.raises(ValueError, match=expected + "another kind of file"):
            read_checkpoint(tmp_path / "a.pt")

    def test_checkpoint_without_tensors_is_named(self, tmp_path):
        torch.save({"epoch": 3}, tmp_path / "weights.pt")
        with pytest.raises(ValueError, match="expected tensors, found none"):
            read_checkpoint(tmp_path / "weights.pt")
