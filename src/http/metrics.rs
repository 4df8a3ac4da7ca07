//! stub
use super::answer::Answer;
use crate::monitor::Monitor;
pub(super) fn answer(_monitor: &Monitor) -> Answer {
    Answer::new(Vec::new())
}
