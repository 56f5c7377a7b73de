//! Results by task, with confidence intervals.

use serde::Serialize;

use crate::runner::{Answer, Verdict};

/// Results of the cases of one task, or of all.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct TaskSummary {
    /// The task.
    pub task: String,
    /// Answered cases.
    pub cases: usize,
    /// Right answers.
    pub right: usize,
    /// Answers cut off before they ended.
    pub cut: usize,
    /// Share of right answers.
    pub score: f64,
    /// Lower end of the 95 % confidence interval of the score.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// One line for each task in the order of their first answers, then one for all.
pub fn by_task(answers: &[Answer]) -> Vec<TaskSummary> {
    let mut tasks: Vec<TaskSummary> = Vec::new();
    let mut all = TaskSummary { task: "all".to_owned(), ..TaskSummary::default() };
    for answer in answers {
        if !tasks.iter().any(|task| task.task == answer.task) {
            tasks.push(TaskSummary { task: answer.task.clone(), ..TaskSummary::default() });
        }
        let own = tasks.iter_mut().filter(|task| task.task == answer.task);
        for task in own.chain([&mut all]) {
            task.cases += 1;
            task.right += usize::from(answer.verdict == Verdict::Right);
            task.cut += usize::from(answer.cut);
        }
    }
    // One task is all there is to say.
    if tasks.len() != 1 {
        tasks.push(all);
    }
    for task in &mut tasks {
        task.score = task.right as f64 / task.cases.max(1) as f64;
        (task.low, task.high) = wilson(task.right, task.cases);
    }
    tasks
}

/// The 95 % confidence interval of a share, by Wilson's formula: unlike the usual one it makes
/// sense for few cases and for shares of 0 and 1.
pub fn wilson(right: usize, cases: usize) -> (f64, f64) {
    const Z: f64 = 1.959964;
    if cases == 0 {
        return (0.0, 1.0);
    }
    let (n, share) = (cases as f64, right as f64 / cases as f64);
    let centre = share + Z * Z / (2.0 * n);
    let spread = Z * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
    let scale = 1.0 + Z * Z / n;
    (((centre - spread) / scale).max(0.0), ((centre + spread) / scale).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_those_of_the_literature() {
        // Values from the formula worked out by hand for well-known examples.
        for (right, cases, low, high) in [
            (0, 10, 0.0, 0.2775),
            (10, 10, 0.7225, 1.0),
            (5, 10, 0.2366, 0.7634),
            (95, 100, 0.8882, 0.9785),
        ] {
            let (l, h) = wilson(right, cases);
            assert!((l - low).abs() < 1e-4 && (h - high).abs() < 1e-4, "{right}/{cases}: {l} {h}");
        }
        assert_eq!(wilson(0, 0), (0.0, 1.0));
    }
}
