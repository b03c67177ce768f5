"""What a user would write without this package: a gym.Env around PEFT LoRA, kept plain.

One env step = one LoRA training step plus one forward pass on the reward batch; the loss before the step is the one
measured after the step before, as any sensible person would have it.
"""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from peft import LoraConfig, get_peft_model


class PeftLoRAEnv(gym.Env[np.ndarray, np.ndarray]):
    """Fine-tune a sequence classifier by LoRA; the action is taken note of, the reward is -(L1 + 0.8·L2)."""

    def __init__(
        self, model: Any, train: dict[str, torch.Tensor], reward: dict[str, torch.Tensor], rank: int = 8,
        batch: int = 16,
    ) -> None:
        """Wrap `model` (it is changed in place) with LoRA on query and value.

        Args:
            model: A transformers sequence classifier, on its device.
            train: input_ids, attention_mask and labels of the training rows, on the same device.
            reward: The same of the reward rows.
            rank: LoRA's r.
            batch: Training rows per step.
        """
        self.model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=["query", "value"],
                                                      modules_to_save=["classifier"]))
        self.train_rows, self.reward_rows, self.batch = train, reward, batch
        self.matrices = 2 * model.config.num_hidden_layers
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (self.matrices, 4), np.float32)
        self.action_space = gym.spaces.MultiDiscrete([4, 3] * self.matrices)
        self.optimiser = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=5e-4)
        self.loss_before = 0.0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Measure the reward loss; the weights stay as they are (this is a benchmark of steps)."""
        super().reset(seed=seed)
        self.loss_before = self.reward_loss()
        return self.observe(), {}

    def train_step(self) -> None:
        """One LoRA training step."""
        self.model.train()
        rows = torch.from_numpy(self.np_random.integers(0, len(self.train_rows["labels"]), self.batch))
        loss = self.model(**{name: column[rows] for name, column in self.train_rows.items()}).loss
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()

    @torch.no_grad()
    def reward_loss(self) -> float:
        """Loss on the reward rows, in evaluation mode."""
        self.model.eval()
        return float(self.model(**self.reward_rows).loss)

    def observe(self) -> np.ndarray:
        """A constant; what a user observes is up to them and costs extra."""
        return np.zeros((self.matrices, 4), dtype=np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Train once, measure once."""
        self.train_step()
        loss = self.reward_loss()
        reward = -(loss + 0.8 * (loss - self.loss_before))
        self.loss_before = loss
        return self.observe(), reward, False, False, {"L1": loss}
