//! The layout of a step: which rows of the batch belong to which work, and which results to whom.

use std::{ops::Range, sync::Arc};

use crate::{
    Work,
    backend::{Batch, HeadOutput, Phase, Span},
    output::{LogitRow, RowOutput, StepOutput, Wanted},
    sampling::{UnusableLogits, argmax},
};

/// Results that a work in [`Phase::Prefill`] must want for the output head to compute them many
/// rows at a time. The choice depends on the work alone, so that its results do.
const HEAD_PREFILL_MIN: usize = 8;

/// A batch, and where its results go.
pub(crate) struct Plan {
    pub batch: Batch,
    /// For each of `batch.logit_rows`, its place in the results.
    places: Vec<Place>,
    /// Results of each work.
    wanted: Vec<usize>,
}

#[derive(Clone, Copy)]
struct Place {
    work: usize,
    /// Index in [`Work::wanted`].
    index: usize,
    wanted: Wanted,
}

/// A result that is wanted, in the order in which the head computes them.
struct Entry {
    place: Place,
    row: usize,
    by_row: bool,
}

impl Plan {
    /// Decoded spans first; in the head, argmaxes before logits before many rows at a time.
    pub fn new(work: &[Work<'_>]) -> Plan {
        let mut order: Vec<usize> = (0..work.len()).collect();
        order.sort_by_key(|&i| work[i].phase == Phase::Prefill);
        let (mut batch, mut entries) = (Batch::default(), Vec::new());
        for &i in &order {
            let rows = add_span(&mut batch, i, &work[i]);
            let by_row = work[i].phase == Phase::Decode || work[i].wanted.len() < HEAD_PREFILL_MIN;
            let first = rows.end - work[i].wanted.len();
            entries.extend(work[i].wanted.iter().enumerate().map(|(index, &wanted)| Entry {
                place: Place { work: i, index, wanted },
                row: first + index,
                by_row,
            }));
        }
        entries.sort_by_key(|e| (!e.by_row, e.place.wanted != Wanted::Argmax));
        batch.decode_logits = entries.iter().filter(|e| e.by_row).count();
        batch.argmax_rows =
            entries.iter().filter(|e| e.by_row && e.place.wanted == Wanted::Argmax).count();
        batch.logit_rows = entries.iter().map(|e| e.row).collect();
        let places = entries.into_iter().map(|e| e.place).collect();
        Plan { batch, places, wanted: work.iter().map(|w| w.wanted.len()).collect() }
    }

    /// The results of every work, in the order of the works.
    pub fn distribute(self, output: HeadOutput, vocab: usize) -> Vec<StepOutput> {
        let missing = RowOutput::Argmax(Err(UnusableLogits));
        let outputs = self.wanted.iter().map(|n| StepOutput { rows: vec![missing.clone(); *n] });
        let mut outputs: Vec<StepOutput> = outputs.collect();
        let step = Arc::new(output.logits);
        let starts = (0..step.len()).step_by(vocab);
        let logits = starts.map(|start| LogitRow::new(&step, start..start + vocab));
        let argmaxes = output.argmax.into_iter().map(RowOutput::Argmax);
        let results = argmaxes.chain(logits.map(RowOutput::Logits));
        for (place, result) in self.places.into_iter().zip(results) {
            outputs[place.work].rows[place.index] = match (place.wanted, result) {
                (Wanted::Argmax, RowOutput::Logits(row)) => RowOutput::Argmax(argmax(&row)),
                (_, result) => result,
            };
        }
        outputs
    }
}

/// Appends a work's tokens to the batch; returns its rows.
fn add_span(batch: &mut Batch, session: usize, work: &Work<'_>) -> Range<usize> {
    let rows = batch.tokens.len()..batch.tokens.len() + work.tokens.len();
    batch.tokens.extend_from_slice(work.tokens);
    if work.phase == Phase::Decode {
        batch.decode_rows = rows.end;
    }
    batch.spans.push(Span { session, start: work.session.len(), rows: rows.clone() });
    rows
}
