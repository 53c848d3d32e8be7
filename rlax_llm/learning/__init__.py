"""From rollouts and rewards to an optimizer step."""
