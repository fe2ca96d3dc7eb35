"""Runs plans on the device, each step by two programs: the forward pass, and the draws. The state is donated from
program to program."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from isthmus.model.device.compilation import compilations
from isthmus.model.ops.flag import Flag
from isthmus.model.ops.sampling import BAD_ROW, Drawn
from isthmus.model.transformer import Params, parameter_specs
from isthmus.model.weights.packing import is_packed, pack_params
from isthmus.serve.engine.adapters import Adapters, Factors, Resident, held_factors
from isthmus.serve.engine.config import Bucket
from isthmus.serve.engine.plan import MOST_ENDS, StepPlan, empty_plan
from isthmus.serve.engine.programs import Compiled, Served, abstract_like, compile_steps
from isthmus.serve.engine.sampling import Adjusting, Bias, abstract_adjusting, no_draws, words
from isthmus.serve.engine.state import empty_state


@dataclass(eq=False)
class Launched:
    """A step on its way."""

    plan: StepPlan
    logits: jax.Array | None = None
    """float32[samples, ids]; None of several steps"""
    hidden: jax.Array | None = None
    """[tokens, dim], in the dtype of the execution: the hidden states after the model's last norm; None of several
    steps"""
    drawn: Drawn | None = None
    """None until the step is sampled. Of several steps, which are sampled at once, each array has one more axis: that
    of EngineConfig.steps_per_launch"""
    steps: jax.Array | None = None
    """int32[]: how many there were; None of a single one"""

    @property
    def tells(self) -> bool:
        """Whether somebody asked for more than the token."""
        return bool((self.plan.draws["logprobs"] >= 0).any())

    @property
    def asked(self) -> list[jax.Array]:
        """What somebody asked for: the tokens first, then what is told about them, and last the hidden states, or the
        number of steps."""
        assert self.drawn is not None, "read before it was sampled"
        asked = [*(self.drawn if self.tells else self.drawn[:1])]
        if self.plan.pooled:
            asked.append(self.hidden)
        if self.steps is not None:
            asked.append(self.steps)
        return asked

    def read(self) -> tuple[Drawn, np.ndarray | None]:
        """What was drawn, as numpy's arrays where somebody asked for it, those of several steps one after the other,
        and the hidden states if the plan pools some; waits for the device. Raises what the device raised."""
        read = jax.device_get(self.asked)
        if self.steps is not None:
            steps = int(read.pop())
            read = [rows[:steps].reshape(-1, *rows.shape[2:]) for rows in read]
        hidden = read.pop() if self.plan.pooled else None
        assert self.drawn is not None
        return Drawn(*read, *self.drawn[len(read) :]), hidden


class Executor:
    """Device state and compiled programs of one engine. `warm_up` must have run before `launch`."""

    def __init__(
        self, served: Served, params: Params, mesh: Mesh, adapters: Mapping[str, Resident] | None = None
    ) -> None:
        """served: with its kernels chosen. params: in the layout and dtypes that serving reads, packed or not.
        adapters: those whose factors are among `params`, by their names."""
        if served.execution.kernels.packs_weights and not is_packed(params):
            params = pack_params(parameter_specs(served.model), dict(params))
        self.served, self.model, self.engine, self.mesh = served, served.model, served.engine, mesh
        self.params, self.adapters = params, Adapters(served.model.lora.adapters, adapters or {})
        self.flag = Flag()
        """Ends a launch of several steps after the one that runs"""
        self._programs = Compiled()
        self.warmup_seconds = 0.0
        self._compilations_when_ready = 0
        implementation = served.execution.kernels.paged_attention
        self.state = empty_state(served.abstract_state(mesh), implementation)

    def free(self) -> None:
        """Gives back the memory of parameters, state and forward passes. No step may be under way; none can follow."""
        for leaf in jax.tree.leaves((self.params, self.state)):
            leaf.delete()
        self._programs = Compiled()

    def warm_up(
        self, ready: Compiled | None = None, on_progress: Callable[[Bucket], None] = lambda bucket: None
    ) -> None:
        """Compiles all programs unless they are `ready`, with on_progress(bucket) after each bucket's, and runs each
        once on padding."""
        if ready is None:
            ready = compile_steps(self.served, self.mesh, abstract_like(self.params), on_progress)
        self._programs = ready
        start = time.perf_counter()
        for bucket in self.engine.buckets:
            self._warm(bucket)
        self.warmup_seconds = time.perf_counter() - start
        self._compilations_when_ready = compilations()

    @property
    def compile_seconds(self) -> float:
        """How long compiling the programs took, or reading them from JAX's cache."""
        return self._programs.seconds

    @property
    def recompilations(self) -> int:
        """Programs compiled in this process since `warm_up`: in serving, 0 is the only right value."""
        return compilations() - self._compilations_when_ready

    def _warm(self, bucket: Bucket) -> None:
        nobody, samples = self.engine.nobody, bucket.samples
        plan = StepPlan(bucket, empty_plan(self.engine, bucket)[0], no_draws(samples, nobody))
        plan.tables = [(nobody, np.zeros(self.engine.pages_per_sequence, np.int32))]
        plan.tokens = [(nobody, np.zeros(self.engine.context_length, np.int32))]
        for bias in (None, Bias.none(samples)):
            plan.bias = bias
            launched = self.launch(plan)
            mask = abstract_adjusting(samples, self.model.vocab_size).allowed
            self.sample(launched, None if bias is None else np.full(mask.shape, -1, np.int32))
            launched.read()
        if bucket in self._programs.several:
            plan.bias, plan.steps, plan.ends = None, 2, np.full((bucket.rows, MOST_ENDS), BAD_ROW, np.int32)
            self.launch(plan).read()

    def place_adapter(self, place: int, factors: Factors) -> None:
        """Writes an adapter's factors into a place, from 1 on, for the steps that are launched from now on."""
        held = held_factors(self.model, self.params)
        self.params = {**self.params, **self._programs.place_adapter(held, np.int32(place), factors)}

    def launch(self, plan: StepPlan) -> Launched:
        """Starts a step's forward pass and returns at once. The step must be sampled before the next is launched; the
        several steps of a plan are."""
        programs, state = self._programs, self.state
        for slot, row in plan.tables:
            state = state._replace(tables=programs.place_table(state.tables, np.int32(slot), row))
        for slot, row in plan.tokens:
            state = state._replace(tokens=programs.place_tokens(state.tokens, np.int32(slot), row))
        if plan.steps > 1:
            run, most = programs.several[plan.bucket], np.int32(plan.steps)
            draws = words(plan.draws)
            self.state, drawn, steps = run(self.params, state, plan.packed, draws, plan.ends, most, self.flag.address)
            return _copied(Launched(plan, drawn=drawn, steps=steps))
        self.state, logits, hidden = programs.forward[plan.bucket](self.params, state, plan.packed)
        return Launched(plan, logits, hidden)

    def sample(self, launched: Launched, mask: np.ndarray | None = None) -> None:
        """Starts a step's draws, unless they were launched with it, and returns at once. mask: int32[samples, words],
        where draws are adjusted."""
        if launched.drawn is not None:
            return
        plan, tokens = launched.plan, self.state.tokens
        if plan.bias is None:
            draw = self._programs.draw[plan.bucket.samples]
            tokens, launched.drawn = draw(launched.logits, tokens, words(plan.draws), None)
        else:
            assert mask is not None, "an adjusted draw needs a mask"
            draw = self._programs.draw_adjusted[plan.bucket.samples]
            tokens, launched.drawn = draw(launched.logits, tokens, words(plan.draws), Adjusting(*plan.bias, mask))
        self.state = self.state._replace(tokens=tokens)
        _copied(launched)


def _copied(launched: Launched) -> Launched:
    """The same, on its way to the host."""
    for part in launched.asked:
        part.copy_to_host_async()
    return launched
