//! A server that hands out unique random numbers over HTTP, and never the same one twice.

pub mod config;
pub mod space;
