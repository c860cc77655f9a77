//! Frames compared byte for byte.
