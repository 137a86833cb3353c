"""How SCVI and SCANVI train unless told otherwise; measured by benchmarks/quality/scvi.py and scanvi.py."""

from typing import Any

# Numbers: held-out ELBO per cell of pbmc_three_chemistries, seed 0 (scvi-tools: -736.6).
SCVI_TRAINING: dict[str, Any] = {
    "batch_size": 128,
    # constant 1e-3 with early stopping: -729.9 in 106 epochs; 3e-3 with cosine decay: -728.8, 6e-3: -724.0,
    # 8e-3: -721.5 in 40 epochs; 1.5e-2: -722.9
    "lr": 8e-3,
    "lr_schedule": "cosine",  # to 0 at the last epoch, so that max_epochs is the length of the run
    "lr_warmup": 0.05,  # the share of the run in which the rate rises from a tenth
    "optimizer": "AdamW",
    "eps": 1e-8,
    # of matrices alone: decay of the biases pulls gene fractions and dispersions off their start by moments
    # (all, 0.3: -720.4; all, 1.0: -728.4; matrices, 1.0: -717.3)
    "weight_decay": 2.0,
    "decay_matrices_only": True,  # nor of what the decoder is told of the batch: z would have to say it
    "encoder_decay": 0.25,  # times weight_decay: the decoder is what overfits; 1 leaves fewer dimensions in use
    "n_epochs_kl_warmup": 10,  # a quarter of the run at most
    "min_kl_weight": 0.0,
    "max_kl_weight": 1.0,
    "train_size": 0.9,
    "patience": 20,  # the weights of the best epoch are kept
}

# With 1 % labels of pbmc_three_chemistries (seed 0; scvi-tools 0.939 / 0.752 accuracy / macro-F1, logistic regression
# on 30 principal components 0.963 / 0.814): 10 epochs at 1e-3 leave the classifier that was trained along at
# 0.961 / 0.845, for the cross entropy goes to 0 on 31 labels; fitted anew (`nn.class_fit`) 0.976 / 0.872, as before
# those epochs (0.976 / 0.869). More epochs do not help the labels.
SCANVI_TRAINING: dict[str, Any] = {
    **SCVI_TRAINING,
    "classification_ratio": 50.0,
    # after from_scvi_model: what SCVI learned is kept
    "max_epochs_pretrained": 10,
    "lr_pretrained": 1e-3,
    "n_epochs_kl_warmup_pretrained": 0,
    # fewer held-out labels than this judge nothing: all labelled cells are trained on (and calibrate by folds)
    "least_held_out_labels": 50,
}


def scvi_epochs(n_cells: int) -> int:
    """Length of SCVI's training: 100,000 cells seen, in 20 to 100 epochs; above 20,000 cells 400,000 seen."""
    if n_cells > 20_000:
        return max(5, round(400_000 / n_cells))
    return min(100, max(20, round(100_000 / n_cells)))


def default_batch_size(n_cells: int, usual: int) -> int:
    """Cells in a minibatch: half the `usual` below 1,000 cells, whose epochs have too few steps otherwise.

    pancreas_human_mouse, 350 cells, seeds 0 and 1: held-out ELBO -853.0 with 128 and -848.4 with 64, batch score of the
    latent space 0.79 and 0.82.
    """
    return usual if n_cells >= 1_000 else max(1, usual // 2)
