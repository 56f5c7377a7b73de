//! What the next step computes: a token of every running answer, and chunks of prompts within the
//! token budget that `pace` gives.

use super::Worker;

/// What a step computes.
#[derive(Default)]
pub(super) struct Plan {
    /// Running requests that take part, ascending.
    pub(super) indices: Vec<usize>,
    pub(super) answers: usize,
    pub(super) prompt_tokens: usize,
}

impl Worker {
    /// Every running answer, and chunks of prompts: half of the budget for the oldest, the rest
    /// for the shortest, so that short ones need not wait for long ones nor long ones forever.
    pub(super) fn plan(&mut self) -> Plan {
        let mut plan = Plan::default();
        let (mut prompts, mut answer_rows) = (Vec::new(), 0);
        for (index, sequence) in self.running.iter_mut().enumerate() {
            if sequence.request.outbox.held_since().is_some() {
                continue;
            }
            if sequence.prefill_left() > 0 {
                prompts.push(index);
            } else {
                answer_rows += sequence.plan_answer();
                plan.answers += 1;
                plan.indices.push(index);
            }
        }
        // Activations are there for a chunk of rows in all.
        let most = self.limits.prefill_chunk.saturating_sub(answer_rows);
        let mut budget = self.pace.prompt_tokens(plan.answers).min(most);
        if let [oldest, _, ..] = prompts[..] {
            self.plan_prompt(oldest, budget.div_ceil(2), &mut budget, &mut plan);
            prompts.remove(0);
        }
        prompts.sort_by_key(|index| self.running[*index].prefill_left());
        for index in prompts {
            self.plan_prompt(index, budget, &mut budget, &mut plan);
        }
        plan.indices.sort_unstable();
        plan
    }

    fn plan_prompt(&mut self, index: usize, share: usize, budget: &mut usize, plan: &mut Plan) {
        if share.min(*budget) == 0 {
            return;
        }
        let tokens = self.running[index].plan_prompt(share);
        *budget = budget.saturating_sub(tokens);
        plan.prompt_tokens += tokens;
        plan.indices.push(index);
    }
}
