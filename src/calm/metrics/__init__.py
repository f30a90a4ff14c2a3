"""Figures of merit for attribution maps and classifiers, as torchmetrics: tensors in, sums kept, estimates out."""
