"""AlexNet as the article and torchvision have it: "One weird trick for parallelizing CNNs" (arXiv:1404.5997)."""

from torch import Tensor, nn


class AlexNet(nn.Module):
    """Five convolutions and three linear layers; 57 M parameters at ten classes, 96 % of them in the linear layers.

    Parameter names and order are torchvision's, so that its weights load as they are. Input from 63 px up: at 224 px
    the adaptive pooling is the identity.

    Weights start as He et al. 2015 (arXiv:1502.01852) derive for ReLUs: PyTorch's own start makes every layer's output
    smaller than its input, and a network without batch norm then spends its first epochs at chance level.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(64, 192, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(192, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            head := nn.Linear(4096, num_classes),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        nn.init.normal_(head.weight, std=0.01)  # all classes about equally likely at first

    def forward(self, image: Tensor) -> Tensor:
        """Maps normalised images (B, 3, H, W) float to logits (B, K)."""
        x = self.features(image)  # (B, 256, h, w)
        x = self.avgpool(x).flatten(1)  # (B, 9216)
        logits: Tensor = self.classifier(x)
        return logits
