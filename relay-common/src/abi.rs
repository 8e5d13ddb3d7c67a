//! How types are declared that the controller and the datapath share in maps.

/// Derives what every ABI type needs.
macro_rules! abi {
    ($(#[$doc:meta])* pub struct $name:ident($size:literal, align $align:literal) { $($(#[$field_doc:meta])* $visibility:vis $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(
            Clone,
            Copy,
            Debug,
            PartialEq,
            Eq,
            zerocopy::FromBytes,
            zerocopy::IntoBytes,
            zerocopy::Immutable,
            zerocopy::KnownLayout,
        )]
        #[repr(C, align($align))]
        pub struct $name { $($(#[$field_doc])* $visibility $field: $type,)* }

        const _: () = assert!(size_of::<$name>() == $size && align_of::<$name>() == $align);
    };
}

pub(crate) use abi;
