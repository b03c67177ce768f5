"""What a policy network may be between its inputs and its heads: an MLP, a ResNet-32 or a TabNet.

The LeLoRA paper's own network is the MLP (Appendix B); Appendix J sets a ResNet-32 and a TabNet beside it. Of those two
it gives the names and the sources, and no width, number of steps or normalisation: what was chosen here is said at
each class. None of the bodies mixes rows, so what a matrix is given depends on that matrix alone, in whatever batch it
comes: where the sources have batch normalisation, LayerNorm over the features of one row takes its place.

Every forward pass is a fixed sequence of tensor operations of fixed shapes, so it can be recorded as a CUDA graph.

Shapes: ... any leading dimensions, such as lanes and matrices · I inputs · O outputs.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lelora_env.errors import LeLoRAError, UnknownNameError


class Body(nn.Module):
    """A network (..., I) -> (..., O) that treats every row alike and for itself.

    Attributes:
        outputs: O, the width of what it returns.
    """

    outputs: int


class MLP(Body, nn.Sequential):
    """The paper's body (Appendix B): a linear layer and a ReLU for each hidden width; without any, the inputs."""

    def __init__(self, inputs: int, hidden: Sequence[int]) -> None:
        """Build the layers: I to the first entry of `hidden`, and on to the last, which is O."""
        widths = [inputs, *hidden]
        super().__init__(*[nn.Sequential(nn.Linear(i, o), nn.ReLU()) for i, o in pairwise(widths)])
        self.outputs = widths[-1]


class ResidualBlock(nn.Module):
    """Two linear layers beside a shortcut, relu(x + LN(W₂ relu(LN(W₁ x)))): (..., O) -> (..., O)."""

    def __init__(self, width: int) -> None:
        """Build a block of `width` features in and out."""
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(),
                                    nn.Linear(width, width), nn.LayerNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        """Add to `x` (..., O) what the layers make of it."""
        return F.relu(x + self.layers(x))


class ResNet32(Body):
    """A residual network of 32 layers for feature vectors, after He et al. (2016), "Deep Residual Learning".

    There, 32 is 6n + 2 with n = 5: a first convolution, 15 blocks of two and a classifier. A convolution needs
    neighbours, and the columns of an observation are no image; the LeLoRA paper does not say how it made one of them.
    Here a layer is a linear layer: the input projection, 15 blocks of two, and as the 32nd the policy's head, so that
    this body holds 31. Chosen besides: one width O for all blocks, the last entry of `hidden` (without any, I), so that
    every shortcut is the identity; LayerNorm where the blocks had batch normalisation, and none after the input
    projection, since over one row it would divide out the row's size. There is nothing to pool.
    """

    blocks = 15

    def __init__(self, inputs: int, hidden: Sequence[int]) -> None:
        """Build the projection and the blocks; of `hidden` only the last entry counts.

        Raises:
            LeLoRAError: O is below 2, of which a LayerNorm leaves nothing.
        """
        super().__init__()
        self.outputs = _normalisable("the width of resnet32 (last entry of hidden)", [inputs, *hidden][-1])
        self.projection = nn.Sequential(nn.Linear(inputs, self.outputs), nn.ReLU())
        self.stack = nn.Sequential(*[ResidualBlock(self.outputs) for _ in range(self.blocks)])

    def forward(self, x: Tensor) -> Tensor:
        """Features (..., I) to (..., O), none of them negative."""
        out: Tensor = self.stack(self.projection(x))
        return out


class GatedLayer(nn.Module):
    """Linear layer, LayerNorm, gated linear unit, u · sigmoid(v) with (u, v) = LN(W x + b): (..., I) -> (..., O)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Build the layer; its matrix is (2·O, I)."""
        super().__init__()
        self.linear, self.norm = nn.Linear(inputs, 2 * outputs), nn.LayerNorm(2 * outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Features (..., I) to (..., O)."""
        return F.glu(self.norm(self.linear(x)))


class AttentiveTransformer(nn.Module):
    """Which inputs a decision step reads, sparsemax(p · LN(W a)): (..., A) and a prior (..., I) -> mask (..., I)."""

    def __init__(self, width: int, inputs: int) -> None:
        """Build it for `width` = A attention features and I inputs."""
        super().__init__()
        self.linear, self.norm = nn.Linear(width, inputs), nn.LayerNorm(inputs)

    def forward(self, attention: Tensor, prior: Tensor) -> Tensor:
        """The mask (..., I): at least 0, a row sums to 1."""
        return sparsemax(prior * self.norm(self.linear(attention)))


class TabNet(Body):
    """The encoder of Arik & Pfister (2021), "TabNet: Attentive Interpretable Tabular Learning".

    Each decision step masks the inputs, with a mask that follows from the step before and from a prior that falls where
    earlier masks were; transforms what is left; and adds the ReLU of one half of the result to the output, while the
    other half leads to the next mask. With m_i the masks, the prior of step i is the product of (γ - m_j) over the
    steps before it. A feature transformer is two layers that all steps share and two of the step's own, each
    `GatedLayer`, the last three with a shortcut scaled by sqrt(0.5). The final linear map is the policy's head.

    Chosen here, as the LeLoRA paper names the method only: three steps and γ = 1.3; decision and attention parts of one
    width O, the last entry of `hidden` (without any, I). LayerNorm stands for ghost batch normalisation, which would
    mix lanes and matrices; the one over the raw inputs is left out, as over one row it would divide out the row's size
    (the environment's observations are scaled already). So does the one behind the first layer as long as biases are 0:
    of a row in which a mask leaves one input, no more than the sign gets through at the very start of training. The
    masks choose among the I inputs, so of an embedding each dimension for itself.
    """

    steps = 3
    relaxation = 1.3
    """γ, at least 1: how freely a step may read again what earlier ones read; at 1 each input is spent once."""

    def __init__(self, inputs: int, hidden: Sequence[int]) -> None:
        """Build the layers; of `hidden` only the last entry counts.

        Raises:
            LeLoRAError: I is below 2, of which a LayerNorm leaves nothing.
        """
        super().__init__()
        _normalisable("the number of inputs of tabnet", inputs)
        self.outputs = [inputs, *hidden][-1]
        width = 2 * self.outputs
        self.shared = nn.ModuleList([GatedLayer(inputs, width), GatedLayer(width, width)])
        self.own = nn.ModuleList([nn.Sequential(GatedLayer(width, width), GatedLayer(width, width))
                                  for _ in range(self.steps + 1)])  # number 0 leads to the first mask
        self.attentive = nn.ModuleList([AttentiveTransformer(self.outputs, inputs) for _ in range(self.steps)])

    def forward(self, x: Tensor) -> Tensor:
        """Features (..., I) to (..., O), none of them negative."""
        prior = torch.ones_like(x)
        _, attention = self._transform(x, 0)
        decisions = []
        for step, attentive in enumerate(self.attentive, start=1):
            mask = attentive(attention, prior)
            prior = prior * (self.relaxation - mask)
            decision, attention = self._transform(mask * x, step)
            decisions.append(F.relu(decision))
        return torch.stack(decisions).sum(dim=0)

    def _transform(self, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The feature transformer of a step: (..., I) to the decision and the attention part, (..., O) each."""
        first, *others = [*self.shared, *self.own[step].children()]
        hidden = first(x)
        for layer in others:
            hidden = (hidden + layer(hidden)) * 0.5**0.5
        decision, attention = hidden.chunk(2, dim=-1)
        return decision, attention


def sparsemax(scores: Tensor) -> Tensor:
    """Nearest point of the probability simplex to each row of scores (Martins & Astudillo, 2016).

    With the scores sorted downwards, the threshold τ is the largest of (sum of the first k, less 1) / k, and the
    result max(scores - τ, 0). The gradient keeps the part along the support that sums to 0.

    Args:
        scores: (..., I) floating point, finite.

    Returns:
        (..., I), at least 0, each row sums to 1; 0 wherever the score is 1 or more below the row's largest.
    """
    scores = scores - scores.detach().amax(dim=-1, keepdim=True)  # changes nothing but the rounding
    with torch.no_grad():
        counts = torch.arange(1, scores.shape[-1] + 1, device=scores.device, dtype=scores.dtype)
        sums = scores.sort(dim=-1, descending=True).values.cumsum(dim=-1)
        support = scores > ((sums - 1) / counts).amax(dim=-1, keepdim=True)
    threshold = ((scores * support).sum(dim=-1, keepdim=True) - 1) / support.sum(dim=-1, keepdim=True)
    return F.relu(scores - threshold)


_BUILDERS: dict[str, type[MLP] | type[ResNet32] | type[TabNet]] = {"mlp": MLP, "resnet32": ResNet32, "tabnet": TabNet}

BODIES = tuple(_BUILDERS)
"""The names that `make_body` knows."""


def make_body(name: str, inputs: int, hidden: Sequence[int], generator: torch.Generator) -> Body:
    """Build a body by name; the global random generator is neither read nor moved.

    Args:
        name: One of `BODIES`.
        inputs: I, at least 1.
        hidden: Widths, each at least 1; ``"mlp"`` has a layer for each, the others read the last one, which is O for
            all of them. Empty: O = I.
        generator: On the CPU; draws the initial weights, see `initialise`.

    Raises:
        UnknownNameError: No such body.
        LeLoRAError: A width is out of range.
    """
    if name not in _BUILDERS:
        raise UnknownNameError("policy network", name, BODIES)
    if min([inputs, *hidden]) < 1:
        raise LeLoRAError(f"a policy network's widths must be integers of at least 1 (got {inputs} inputs and hidden "
                          f"widths {list(hidden)}); leave hidden empty for no hidden layer")
    with torch.random.fork_rng(devices=[]):
        body = _BUILDERS[name](inputs, hidden)
    initialise(body, generator)
    return body


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every weight anew, Kaiming-uniform (He et al., 2015); biases 0, a LayerNorm's scale 1.

    Args:
        module: Changed in place; its parameters are drawn in the order of ``module.parameters()``.
        generator: On the parameters' device.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.dim() > 1:
                nn.init.kaiming_uniform_(parameter, nonlinearity="relu", generator=generator)
            else:
                nn.init.constant_(parameter, float(isinstance(part, nn.LayerNorm) and name == "weight"))


def _normalisable(what: str, width: int) -> int:
    if width < 2:
        raise LeLoRAError(f"{what} must be at least 2 (got {width}), since LayerNorm makes a constant of a single "
                          "number; make it larger, or choose the body 'mlp'")
    return width
