"""The whole method in one file: a CALM classifier, its loss, one training step, and its map.

Run it: python examples/minimal_calm.py
The library does the same, faster and guarded; tests/test_examples.py holds the two equal.
"""

import torch
from torch import Tensor, nn


class MinimalCalm(nn.Module):
    """A backbone and two 1x1 convolutions: `conv_last` scores classes, `attention` scores locations."""

    def __init__(self, backbone: nn.Module, channels: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.conv_last = nn.Conv2d(channels, num_classes, 1)
        self.attention = nn.Conv2d(channels, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return p(y, z | x): for each image the probability of every pair of class and location, (B, C, h, w)."""
        features = self.backbone(images)
        conditional = self.conv_last(features).softmax(dim=1)  # p(y | x, z)
        activation = nn.functional.softplus(self.attention(features))
        prior = activation / activation.sum(dim=(2, 3), keepdim=True)  # p(z | x)
        return conditional * prior


def predict(joint: Tensor) -> Tensor:
    """Return p(y | x), the joint summed over locations, (B, C)."""
    return joint.sum(dim=(2, 3))


def em_loss(joint: Tensor, targets: Tensor) -> Tensor:
    """Return the EM loss: E-step, which locations explain the target; M-step, make them explain it better."""
    target = joint[torch.arange(len(joint)), targets]  # p(target, z | x)
    posterior = (target / target.sum(dim=(1, 2), keepdim=True)).detach()  # q(z) = p(z | x, target)
    return -(posterior * target.log()).sum(dim=(1, 2)).mean()


def main() -> None:
    """Train on squares whose colour is the class; the model learns to find the square from the class alone."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), nn.ReLU())
    model = MinimalCalm(backbone, channels=16, num_classes=3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for step in range(301):
        images, targets = torch.rand(32, 3, 32, 32) * 0.3, torch.randint(3, (32,))
        for image, target in zip(images, targets, strict=True):  # the class is the colour of one small square
            y, x = torch.randint(0, 7, (2,)) * 4
            image[target, y : y + 4, x : x + 4] = 1.0
        joint = model(images)
        loss = em_loss(joint, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            accuracy = (predict(joint).argmax(1) == targets).float().mean()
            print(f"step {step:3d}  loss {loss:.3f}  accuracy {accuracy:.2f}")
    where = joint[0, targets[0]]
    print(f"p(y | x) = {where.sum():.3f}; of it, in one of the {where.numel()} cells: {where.max():.3f}")


if __name__ == "__main__":
    main()
