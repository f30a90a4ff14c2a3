"""CALM on a network of timm in a plain training loop: the five lines that matter are marked.

Run it: python examples/plain_loop.py
The network keeps its own forward pass up to the pooling; the head, the loss and the maps are CALM's.
"""

import timm
import torch

import calm


def squares(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise (B, 3, 32, 32) with a bright square, whose colour is the class (B,): red, green or blue."""
    images, targets = torch.rand(count, 3, 32, 32) * 0.3, torch.randint(3, (count,))
    for image, target in zip(images, targets, strict=True):
        y, x = (8 * torch.randint(0, 4, (2,))).tolist()
        image[target, y : y + 8, x : x + 8] = 1.0
    return images, targets


def main(steps: int = 60) -> float:
    """Train, print the loss, and return the mean share of a map that lies on the square."""
    torch.manual_seed(0)
    backbone = timm.create_model("resnet18", num_classes=0, global_pool="", output_stride=8)  # 1
    head = calm.CalmHead(backbone.num_features, num_classes=3)  # 2
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=1e-3)
    for step in range(steps):
        images, targets = squares(16)
        output = head(backbone(images))  # 3
        loss = calm.em_loss(output, targets)  # 4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:2d}  loss {loss.item():.3f}")
    backbone.eval()
    images, targets = squares(32)
    with torch.no_grad():
        output = head(backbone(images))
    maps = output.attribute(targets)  # 5: p(y, z | x), (32, 4, 4)
    bright = images.amax(dim=1) > 0.9
    share = (output.mass(targets, bright) / maps.sum((1, 2))).mean().item()
    print(
        f"accuracy {(output.probs.argmax(1) == targets).float().mean():.2f}; of a map, {share:.2f} lies on the square"
    )
    return share


if __name__ == "__main__":
    main()
