//! A step of the engine, and what becomes of it.

use std::time::{Duration, Instant};

use ds4_engine::{BackendError, StepError, StepOutput};
use rayon::prelude::*;

use super::Worker;
use crate::{
    request::Failure,
    scheduler::{
        outbox::Outbox,
        sequence::{Outcome, Sequence},
    },
};

/// So many logits are worth looking at on several threads: two rows of the real model.
const WORTH_SHARING: usize = 1 << 18;

impl Worker {
    /// One step of the engine; false if there was nothing to compute.
    pub(super) fn step(&mut self) -> bool {
        let planned = self.plan();
        if planned.indices.is_empty() {
            self.running.iter_mut().for_each(|sequence| sequence.request.outbox.flush());
            return false;
        }
        let (result, time) = self.compute(&planned.indices);
        self.pace.measured(planned.answers, planned.prompt_tokens, time);
        self.observer.step(planned.answers, planned.prompt_tokens, time);
        match result {
            Ok(outputs) => self.take_in(&planned.indices, &outputs),
            Err(error) => self.failed(&planned.indices, error),
        }
        true
    }

    /// Runs the engine. Meanwhile other threads tell clients of the last step's tokens, and find
    /// out what may come next in answers that have rules.
    fn compute(&mut self, indices: &[usize]) -> (Result<Vec<StepOutput>, StepError>, Duration) {
        let engine = &self.engine;
        let (mut work, mut outboxes) = (Vec::with_capacity(indices.len()), Vec::new());
        rayon::in_place_scope(|scope| {
            for (index, sequence) in self.running.iter_mut().enumerate() {
                let parts = sequence.parts();
                outboxes.push(parts.outbox);
                if indices.binary_search(&index).is_ok() {
                    work.push(parts.work);
                    if parts.answer.wants_look_ahead() {
                        scope.spawn(|_| parts.answer.look_ahead());
                    }
                }
            }
            scope.spawn(|_| outboxes.into_iter().for_each(Outbox::flush));
            let begun = Instant::now();
            (engine.step(&mut work), begun.elapsed())
        })
    }

    /// Adds a token to each answer that has new logits.
    fn take_in(&mut self, indices: &[usize], outputs: &[StepOutput]) {
        let (engine, tokenizer) = (&self.engine, &*self.tokenizer);
        let running = self.running.iter_mut().enumerate();
        let stepped = running.filter(|(index, _)| indices.binary_search(index).is_ok());
        let mut stepped: Vec<_> = stepped.map(|(_, sequence)| sequence).zip(outputs).collect();
        stepped.iter_mut().for_each(|(sequence, _)| sequence.stepped(engine));
        let extend =
            |(sequence, output): (&mut Sequence, &StepOutput)| sequence.extend(tokenizer, output);
        let size: usize = outputs.iter().flat_map(StepOutput::logits).map(<[f32]>::len).sum();
        let outcomes: Vec<_> = if size >= WORTH_SHARING {
            stepped.into_par_iter().map(extend).collect()
        } else {
            stepped.into_iter().map(extend).collect()
        };
        for (index, outcome) in indices.iter().zip(outcomes).rev() {
            if let Outcome::Ended(event) = outcome {
                let sequence = self.running.remove(*index);
                self.end_and_keep(sequence, Some(event));
            }
        }
    }

    /// A step failed. Who asks for more memory than there is waits or fails alone.
    fn failed(&mut self, indices: &[usize], error: StepError) {
        match error {
            StepError::NoRoom { work, reason } => {
                self.observer.out_of_memory();
                self.note_full_memory();
                if self.evict() {
                    return;
                }
                if self.running.len() > 1 {
                    self.preempt(self.running.len() - 1);
                } else {
                    self.fail(&indices[work..=work], &Failure::Memory(reason));
                }
            }
            StepError::Backend(BackendError::OutOfMemory(reason)) => {
                self.note_full_memory();
                let alone = self.running.len() == 1;
                let easier = self.pace.halve() | self.evict();
                if alone && !easier {
                    return self.fail(indices, &Failure::Memory(reason));
                }
                // What the step's sessions hold is incomplete.
                indices.iter().rev().for_each(|index| self.preempt(*index));
            }
            StepError::Backend(error) => self.give_up(&error),
            error => self.fail(indices, &Failure::Engine(error.to_string())),
        }
    }
}
