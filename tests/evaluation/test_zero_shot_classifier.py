"""Zero-shot classification with tiny models, against prompts and images embedded one by one."""

import io

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from testing import tiny_models
from transformers import BertConfig, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

from hf_dissect.evaluation import class_embeddings, evaluate_zero_shot
from hf_dissect.models.feature_encoder import PrecomputedFeaturesConfig

NAMES = ["red", "green", "blue", "yellow", "white", "purple"]
TEMPLATES = ["a {} patch on the left", "there is {} at the top {x}"]
FAMILIES = ["clip", "siglip", "siglip2", "dual_encoder", "chinese_clip", "align"]


def labelled(num_rows: int = 24, broken: tuple[int, ...] = (), label: object = None) -> Dataset:
    """Pictures whose label is their colour; the files of the `broken` rows are cut short, empty or absent."""
    files = []
    for row in range(num_rows):
        buffer = io.BytesIO()
        tiny_models.tiny_picture(row % len(NAMES), seed=row)[0].save(buffer, format="PNG")
        files.append({"bytes": buffer.getvalue(), "path": None})
    for kind, row in enumerate(broken):
        files[row] = [{"bytes": files[row]["bytes"][:60], "path": None}, {"bytes": b"", "path": None}, None][kind % 3]
    features = Features({"image": Image(decode=False), "label": label or Value("int64")})
    labels = [row % len(NAMES) for row in range(num_rows)]
    if label == Value("string"):
        labels = [NAMES[index] for index in labels]
    return Dataset.from_dict({"image": files, "label": labels}, features=features)


def one_by_one(method, **inputs) -> torch.Tensor:
    with torch.no_grad():
        embeds = method(**inputs).pooler_output[0]
    return embeds / embeds.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_class_embedding_is_the_normalised_mean_over_templates(family: str) -> None:
    model, processor = getattr(tiny_models, f"tiny_{family}")()
    # SigLIP was trained on padded text only; the others ignore padding, and here get none.
    padding = "max_length" if family.startswith("siglip") else False
    expected = []
    for name in NAMES:
        prompts = [template.replace("{}", name) for template in TEMPLATES]
        longest = processor.tokenizer.model_max_length
        options = {"padding": padding, "truncation": True, "max_length": longest, "return_tensors": "pt"}
        inputs = [processor.tokenizer(prompt, **options) for prompt in prompts]
        mean = sum(one_by_one(model.get_text_features, **one) for one in inputs) / len(prompts)
        expected.append(mean / mean.norm())
    found = class_embeddings(model, processor, NAMES, TEMPLATES, batch_size=5)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_accuracy_is_that_of_images_classified_one_by_one(family: str) -> None:
    model, processor = getattr(tiny_models, f"tiny_{family}")()
    classes = class_embeddings(model, processor, NAMES, TEMPLATES)
    dataset = labelled()
    order = []
    for file in dataset["image"]:
        inputs = processor.image_processor(images=Image().decode_example(file), return_tensors="pt")
        order.append((classes @ one_by_one(model.get_image_features, **inputs)).argsort(descending=True).tolist())
    labels = dataset["label"]
    found = evaluate_zero_shot(model, processor, dataset, NAMES, TEMPLATES, batch_size=7)
    top1 = [label in ranked[:1] for label, ranked in zip(labels, order, strict=True)]
    top5 = [label in ranked[:5] for label, ranked in zip(labels, order, strict=True)]
    assert found == pytest.approx(
        {
            "accuracy@1": np.mean(top1),
            "accuracy@5": np.mean(top5),
            "mean_per_class_accuracy": np.mean(top1),  # Every class occurs equally often.
            "num_images": 24,
            "num_skipped": 0,
        }
    )


@pytest.mark.parametrize("label", [Value("int64"), Value("string"), ClassLabel(names=NAMES)])
def test_labels_of_any_kind_mean_the_same(tiny_clip, label) -> None:
    expected = evaluate_zero_shot(*tiny_clip, labelled(), NAMES, TEMPLATES)
    assert evaluate_zero_shot(*tiny_clip, labelled(label=label), NAMES, TEMPLATES) == expected


def test_class_labels_in_another_order_are_matched_by_name(tiny_clip) -> None:
    dataset = labelled(label=ClassLabel(names=NAMES))
    expected = evaluate_zero_shot(*tiny_clip, dataset, NAMES, TEMPLATES)
    assert evaluate_zero_shot(*tiny_clip, dataset, NAMES[::-1], TEMPLATES) == pytest.approx(expected)
    other_words = labelled(label=ClassLabel(names=[f"n{index}" for index in range(6)]))
    assert evaluate_zero_shot(*tiny_clip, other_words, NAMES, TEMPLATES) == pytest.approx(expected)


def test_broken_images_are_skipped_and_counted_decoded_or_not(tiny_clip) -> None:
    kept = [row for row in range(24) if row not in (0, 5, 9, 23)]
    expected = evaluate_zero_shot(*tiny_clip, labelled().select(kept), NAMES, TEMPLATES)
    broken = labelled(broken=(0, 5, 9, 23)).rename_columns({"image": "photo", "label": "kind"})
    for dataset in (broken, broken.cast_column("photo", Image()), broken.with_format("torch")):
        found = evaluate_zero_shot(*tiny_clip, dataset, NAMES, TEMPLATES, "photo", "kind", batch_size=4)
        assert found == pytest.approx({**expected, "num_images": 20, "num_skipped": 4})


def test_a_batch_of_broken_images_only_is_no_end(tiny_clip) -> None:
    found = evaluate_zero_shot(*tiny_clip, labelled(6, broken=(0, 1)), NAMES, TEMPLATES, batch_size=2)
    assert (found["num_images"], found["num_skipped"]) == (4, 2)
    with pytest.raises(ValueError, match="None of the 3 images in 'image' could be decoded; row 0:"):
        evaluate_zero_shot(*tiny_clip, labelled(3, broken=(0, 1, 2)), NAMES, TEMPLATES)


def test_modes_gradients_and_the_random_stream_are_left_alone(tiny_clip) -> None:
    model, processor = tiny_clip
    model.train()
    model.vision_model.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert not class_embeddings(model, processor, NAMES, TEMPLATES).requires_grad
    evaluate_zero_shot(model, processor, labelled(6), NAMES, TEMPLATES)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_half_precision_weights_are_fed_in_their_type(tiny_clip) -> None:
    model, processor = tiny_clip
    found = evaluate_zero_shot(model.to(torch.bfloat16), processor, labelled(6), NAMES, TEMPLATES)
    assert 0 <= found["accuracy@1"] <= 1 and found["num_images"] == 6


def test_a_method_that_returns_a_tensor_is_understood(tiny_clip) -> None:
    model, processor = tiny_clip
    expected = class_embeddings(model, processor, NAMES, TEMPLATES)

    class TensorModel(type(model)):
        """Answers as models did in transformers 4."""

        def get_text_features(self, input_ids, attention_mask=None):
            return super().get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output

    model.__class__ = TensorModel
    assert torch.equal(class_embeddings(model, processor, NAMES, TEMPLATES), expected)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], TEMPLATES, "class_names is"),
        ("red", TEMPLATES, "class_names is 'red'"),
        (["red", " "], TEMPLATES, "class_names is"),
        (["red", "red"], TEMPLATES, r"class_names repeats \['red'\]"),
        (NAMES, [], "templates is"),
        (NAMES, ["a photo"], "'a photo', but each needs exactly one {}"),
        (NAMES, ["{} {}"], "exactly one {}"),
    ],
)
def test_bad_prompts_are_named(tiny_clip, names, templates, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_embeddings(*tiny_clip, names, templates)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.remove_columns("image"), "No column named image or image_features or .*; the dataset has label"),
        (lambda d: d.remove_columns("label"), "No column named label or labels or .*; the dataset has image"),
        (lambda d: d.select([]), "empty"),
        (lambda d: d.remove_columns("image").add_column("image", [1] * 24), r"must hold pictures \(a datasets.Image"),
        (
            lambda d: d.map(lambda row: {"label": row["label"] + 1}),
            "4 labels of 'label' are not classes, first 6 in row 5",
        ),
        (lambda d: d.map(lambda row: {"label": None}), "24 labels of 'label' are not classes, first None in row 0"),
        (lambda d: d.map(lambda row: {"label": [0]}), "one label for each image"),
        (lambda d: d.map(lambda row: {"label": "cat"}), "first 'cat' in row 0"),
        (lambda d: labelled(label=ClassLabel(names=[*NAMES, "grey"])), "knows 7 classes, but class_names has 6"),
    ],
)
def test_bad_data_are_named(tiny_clip, change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_zero_shot(*tiny_clip, change(labelled()), NAMES, TEMPLATES)


def test_a_stream_or_another_model_is_refused(tiny_clip) -> None:
    model, processor = tiny_clip
    with pytest.raises(TypeError, match="dataset is a IterableDataset"):
        evaluate_zero_shot(model, processor, labelled().to_iterable_dataset(), NAMES, TEMPLATES)
    with pytest.raises(ValueError, match="has no get_image_features"):
        evaluate_zero_shot(model.text_model, processor, labelled(), NAMES, TEMPLATES)
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluate_zero_shot(model, processor, labelled(), NAMES, TEMPLATES, batch_size=0)


@pytest.mark.parametrize(("image", "label"), [("jpg", "cls"), ("img", "category"), ("image_path", "labels")])
def test_usual_names_of_columns_are_recognised(tiny_clip, image, label, tmp_path) -> None:
    expected = evaluate_zero_shot(*tiny_clip, labelled(), NAMES, TEMPLATES)
    dataset = labelled().rename_columns({"image": image, "label": label})
    if image == "image_path":
        paths = [str(tmp_path / f"{row}.png") for row in range(len(dataset))]
        for path, file in zip(paths, dataset[image], strict=True):
            with open(path, "wb") as target:
                target.write(file["bytes"])
        dataset = dataset.remove_columns(image).add_column(image, paths)
    assert evaluate_zero_shot(*tiny_clip, dataset, NAMES, TEMPLATES) == pytest.approx(expected)


@pytest.fixture(scope="module")
def feature_model():
    """A model that reads stored features of 6 numbers, and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = tiny_models.bert_tokenizer()
    text = BertConfig(**tiny_models._text_config(tokenizer))
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        PrecomputedFeaturesConfig(hidden_size=6), text, projection_dim=8
    )
    return VisionTextDualEncoderModel(config).eval(), tokenizer


def test_stored_features_are_classified_without_a_processor_of_images(feature_model) -> None:
    model, tokenizer = feature_model
    features = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    rows = {"image_features": [*features.tolist(), [1.0] * 5, [float("nan")] * 6], "label": [*range(6)] * 3 + [0] * 4}
    found = evaluate_zero_shot(model, tokenizer, Dataset.from_dict(rows), NAMES, TEMPLATES, batch_size=7)
    with torch.no_grad():
        images = model.get_image_features(pixel_values=torch.from_numpy(features)).pooler_output
    nearest = (images @ class_embeddings(model, tokenizer, NAMES, TEMPLATES).T).argmax(1).numpy()
    assert (found["num_images"], found["num_skipped"]) == (20, 2)
    assert found["accuracy@1"] == np.mean(nearest == np.array(rows["label"])[:20])


def test_images_of_another_kind_than_the_model_reads_are_named(feature_model, tiny_clip) -> None:
    with pytest.raises(
        ValueError, match=r"'image' holds pictures, but the model \(Vision.*\) reads feature vectors of 6"
    ):
        evaluate_zero_shot(*feature_model, labelled(), NAMES, TEMPLATES)
    vectors = Dataset.from_dict({"image": [[1.0, 2.0]] * 6, "label": range(6)})
    with pytest.raises(
        ValueError, match=r"'image' holds feature vectors of 2 numbers, but the model \(CLIPModel\) reads"
    ):
        evaluate_zero_shot(*tiny_clip, vectors, NAMES, TEMPLATES)
    with pytest.raises(ValueError, match="feature vectors of 2 numbers, .* reads feature vectors of 6 numbers"):
        evaluate_zero_shot(*feature_model, vectors, NAMES, TEMPLATES)


def test_each_image_is_classified_by_the_experts_of_its_task() -> None:
    model, processor = tiny_models.tiny_clip()
    model = tiny_models.with_mola(model, "grad", num_experts=3)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "mola_B" in name:
                weight.normal_(std=2)
    dataset, tasks = labelled(30), np.random.default_rng(0).integers(0, 3, 30)
    with_tasks = dataset.add_column("style", [["oil", "ink", "chalk"][task] for task in tasks])
    hits = np.zeros(30, bool)
    for task in range(3):
        model.base_model.set_task(task)
        classes = class_embeddings(model, processor, NAMES, TEMPLATES)
        for row in np.flatnonzero(tasks == task).tolist():
            picture = Image().decode_example(dataset[row]["image"])
            inputs = processor.image_processor(images=picture, return_tensors="pt")
            image = one_by_one(model.get_base_model().get_image_features, **inputs)
            hits[row] = int((classes @ image).argmax()) == dataset[row]["label"]
    model.base_model.set_task(None)
    mean = evaluate_zero_shot(model, processor, dataset, NAMES, TEMPLATES)
    names = {"task_column": "style", "task_names": ["oil", "ink", "chalk"]}
    found = evaluate_zero_shot(model, processor, with_tasks, NAMES, TEMPLATES, **names)
    assert found["accuracy@1"] == pytest.approx(hits.mean()) != mean["accuracy@1"]
    assert found["num_images"] == 30
    assert evaluate_zero_shot(model, processor, dataset, NAMES, TEMPLATES) == mean, "no task stays in force"
    with pytest.raises(ValueError, match="'chalk' is not a task of the training, which are oil, ink"):
        evaluate_zero_shot(model, processor, with_tasks, NAMES, TEMPLATES, **(names | {"task_names": ["oil", "ink"]}))
    numbered = dataset.add_column("style", (tasks + 1).tolist())
    with pytest.raises(ValueError, match="dataset has task 3, but the adapter has num_experts=3"):
        evaluate_zero_shot(model, processor, numbered, NAMES, TEMPLATES, task_column="style")
