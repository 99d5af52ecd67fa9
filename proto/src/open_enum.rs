// SPDX-License-Identifier: GPL-2.0 OR MIT

//! Enumerations of the wire whose unknown values are data.
//!
//! A Rust `enum` may not hold a number that it does not name, but a peer may send any. The macro
//! makes a transparent integer with named constants instead; `Debug` prints the name or the
//! number. It is used by this crate's modules only.

/// Declares an open enumeration over `u8`, `u16`, `u32` or `u64` (little-endian on the wire).
macro_rules! open_enum {
    ($(#[$meta:meta])* $vis:vis struct $name:ident: u8 { $($body:tt)* }) => {
        open_enum!(@make [$(#[$meta])*] $vis $name, u8, u8, { $($body)* });
        impl $name {
            /// Wraps a number, known or not.
            #[inline]
            pub const fn new(raw: u8) -> Self {
                Self(raw)
            }

            /// The number as it stands on the wire.
            #[inline]
            pub const fn get(self) -> u8 {
                self.0
            }
        }
    };
    ($(#[$meta:meta])* $vis:vis struct $name:ident: u16 { $($body:tt)* }) => {
        open_enum!(@wide [$(#[$meta])*] $vis $name, u16, zerocopy::little_endian::U16,
            { $($body)* });
    };
    ($(#[$meta:meta])* $vis:vis struct $name:ident: u32 { $($body:tt)* }) => {
        open_enum!(@wide [$(#[$meta])*] $vis $name, u32, zerocopy::little_endian::U32,
            { $($body)* });
    };
    ($(#[$meta:meta])* $vis:vis struct $name:ident: u64 { $($body:tt)* }) => {
        open_enum!(@wide [$(#[$meta])*] $vis $name, u64, zerocopy::little_endian::U64,
            { $($body)* });
    };
    (@wide [$($meta:tt)*] $vis:vis $name:ident, $raw:ty, $store:ty, $body:tt) => {
        open_enum!(@make [$($meta)*] $vis $name, $raw, $store, $body);
        impl $name {
            /// Wraps a number, known or not.
            #[inline]
            pub const fn new(raw: $raw) -> Self {
                Self(<$store>::new(raw))
            }

            /// The number as it stands on the wire.
            #[inline]
            pub const fn get(self) -> $raw {
                self.0.get()
            }
        }
    };
    (@make [$($meta:tt)*] $vis:vis $name:ident, $raw:ty, $store:ty,
        { $($(#[$vmeta:meta])* $variant:ident = $value:expr),* $(,)? }) => {
        $($meta)*
        #[derive(
            Clone,
            Copy,
            PartialEq,
            Eq,
            Hash,
            zerocopy_derive::FromBytes,
            zerocopy_derive::IntoBytes,
            zerocopy_derive::Immutable,
            zerocopy_derive::KnownLayout,
            zerocopy_derive::Unaligned,
        )]
        #[repr(transparent)]
        $vis struct $name($store);

        impl $name {
            $($(#[$vmeta])* pub const $variant: Self = Self::new($value);)*

            /// The name of a known value, `None` for any other.
            pub const fn name(self) -> Option<&'static str> {
                $(if self.get() == $value { return Some(stringify!($variant)); })*
                None
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, concat!(stringify!($name), "({:#x})"), self.get()),
                }
            }
        }

        impl From<$raw> for $name {
            #[inline]
            fn from(raw: $raw) -> Self {
                Self::new(raw)
            }
        }

        impl From<$name> for $raw {
            #[inline]
            fn from(value: $name) -> Self {
                value.get()
            }
        }
    };
}
