//! Requests that wait for their turn: first come first served within a client, and clients take
//! turns, so that one with many requests delays the others by one request at most.

use std::{collections::VecDeque, time::Instant};

use tokio::sync::mpsc;

use crate::request::{ClientId, Event, Request};

/// A request on its way.
pub(crate) struct Submitted {
    pub(crate) request: Request,
    pub(crate) events: mpsc::Sender<Event>,
    /// When it was submitted.
    pub(crate) since: Instant,
}

/// Waiting requests.
#[derive(Default)]
pub(super) struct Queue {
    /// Clients in the order of their turns, each with at least one request.
    clients: VecDeque<(ClientId, VecDeque<Submitted>)>,
}

impl Queue {
    /// Adds a request.
    pub(super) fn push(&mut self, request: Submitted) {
        let client = request.request.client;
        match self.clients.iter_mut().find(|(id, _)| *id == client) {
            Some((_, requests)) => requests.push_back(request),
            None => self.clients.push_back((client, VecDeque::from([request]))),
        }
    }

    /// The request whose turn it is.
    pub(super) fn peek(&self) -> Option<&Submitted> {
        self.clients.front().and_then(|(_, requests)| requests.front())
    }

    /// Takes the request whose turn it is; its client's next turn comes after the others'.
    pub(super) fn pop(&mut self) -> Option<Submitted> {
        let (client, mut requests) = self.clients.pop_front()?;
        let request = requests.pop_front();
        if !requests.is_empty() {
            self.clients.push_back((client, requests));
        }
        request
    }

    /// Puts a request back whose turn it was, and still is.
    pub(super) fn put_back(&mut self, request: Submitted) {
        let client = request.request.client;
        let place = self.clients.iter().position(|(id, _)| *id == client);
        let others = place.and_then(|place| self.clients.remove(place));
        let mut requests = others.map_or_else(VecDeque::new, |(_, requests)| requests);
        requests.push_front(request);
        self.clients.push_front((client, requests));
    }

    /// Takes out every request that `test` names.
    pub(super) fn remove(&mut self, test: impl Fn(&Submitted) -> bool) -> Vec<Submitted> {
        let mut removed = Vec::new();
        for (_, requests) in &mut self.clients {
            let (gone, kept): (VecDeque<_>, VecDeque<_>) = requests.drain(..).partition(&test);
            removed.extend(gone);
            *requests = kept;
        }
        self.clients.retain(|(_, requests)| !requests.is_empty());
        removed
    }

    /// How many wait.
    pub(super) fn len(&self) -> usize {
        self.clients.iter().map(|(_, requests)| requests.len()).sum()
    }
}
