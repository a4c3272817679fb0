"""Folds: of equal size, without a pair that shares its image or its caption with one of another fold."""

import pytest
import torch

from hf_dissect.auditing.folds import assign_folds, find_training_pairs


def shared_between_folds(fold: torch.Tensor, keys: torch.Tensor) -> int:
    """Count the keys that occur in more than one fold."""
    return sum(len(set(fold[keys == key].tolist())) > 1 for key in keys.unique())


@pytest.mark.parametrize("folds", [2, 3, 5])
@pytest.mark.parametrize("captions_per_image", [1, 5])
def test_folds_are_of_equal_size_and_share_nothing(folds, captions_per_image):
    generator = torch.Generator().manual_seed(0)
    image = torch.arange(1200 // captions_per_image).repeat_interleave(captions_per_image) * 977
    caption = torch.randint(0, 2**62, (1200,), generator=generator)
    caption[torch.randperm(1200, generator=generator)[:60]] = caption[:60].clone()  # some captions are repeated
    fold = assign_folds(image, caption, folds, seed=1)
    assert shared_between_folds(fold, image) == shared_between_folds(fold, caption) == 0
    sizes = torch.bincount(fold)
    assert len(sizes) == folds and sizes.max() - sizes.min() <= 20 * captions_per_image
    assert torch.equal(fold, assign_folds(image, caption, folds, seed=1))
    assert not torch.equal(fold, assign_folds(image, caption, folds, seed=2))


def test_pairs_linked_over_many_steps_stay_together():
    # Image 0 - caption 0 - image 1 - caption 1 - ...: a chain of 40 pairs, then pairs of their own.
    step = torch.arange(40)
    image = torch.cat([(step + 1) // 2, torch.arange(100, 300)])
    caption = torch.cat([step // 2, torch.arange(100, 300)])
    shuffled = torch.randperm(240, generator=torch.Generator().manual_seed(0))
    fold = torch.empty(240, dtype=torch.int64)
    fold[shuffled] = assign_folds(image[shuffled], caption[shuffled], 2)
    assert len(fold[:40].unique()) == 1 and torch.bincount(fold).tolist() == [120, 120]


def test_a_caption_of_nearly_all_pairs_is_left_out_of_training_instead():
    image = torch.arange(400)
    caption = torch.arange(400)
    caption[:150] = 7  # "image"
    caption[200:260] = torch.arange(60)
    image[150:200] = torch.arange(50)  # links those to others
    fold = assign_folds(image, caption, 2)
    assert shared_between_folds(fold, image) == 0
    for scored in (0, 1):
        training = find_training_pairs(fold, scored, caption)
        assert (fold[training] != scored).all()
        assert not set(caption[training].tolist()) & set(caption[fold == scored].tolist())
        assert not set(image[training].tolist()) & set(image[fold == scored].tolist())


def test_data_that_cannot_be_divided_are_refused_with_the_way_out():
    many, one = torch.arange(300), torch.zeros(300, dtype=torch.int64)
    for image in (one, torch.where(many < 180, 0, many)):
        with pytest.raises(ValueError, match="pairs that share an image stay together"):
            assign_folds(image, many, 2)
    with pytest.raises(ValueError, match="give more pairs or fewer folds"):
        assign_folds(many, many, 50)
    classes = torch.arange(300) % 3
    fold = assign_folds(many, classes, 2)
    with pytest.raises(ValueError, match="share captions, such as names of classes"):
        [find_training_pairs(fold, scored, one) for scored in (0, 1)]
