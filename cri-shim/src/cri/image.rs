//! ImageService: what is on the node, and bringing more.

use std::collections::HashMap;
use std::time::Instant;

use tonic::{Code, Request, Response, Status};

use super::proto::image_service_server::ImageService;
use super::proto::*;
use super::runtime::{Parts, parts};
use super::{Node, convert};
use crate::audit;
use crate::error::Error;
use crate::image::{self, Auth};

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl ImageService for Node {
    async fn list_images(&self, request: Request<ListImagesRequest>) -> Answer<ListImagesResponse> {
        Ok(Response::new(ListImagesResponse { images: listed(self, request.into_inner().filter)? }))
    }

    /// An image that is not there is an answer without one, not an error.
    async fn image_status(&self, request: Request<ImageStatusRequest>) -> Answer<ImageStatusResponse> {
        let ImageStatusRequest { image, verbose } = request.into_inner();
        let name = named(image)?;
        let Some(image) = self.images.resolve(&name) else { return Ok(Response::new(ImageStatusResponse::default())) };
        let info = if verbose { info(&image) } else { HashMap::new() };
        Ok(Response::new(ImageStatusResponse { image: Some(wire_image(&image)), info }))
    }

    async fn pull_image(&self, request: Request<PullImageRequest>) -> Answer<PullImageResponse> {
        let PullImageRequest { image, auth, sandbox_config: _ } = request.into_inner();
        let name = named(image)?;
        audit::image(&name);
        let began = Instant::now();
        let pulled = self.images.pull(&name, auth.map(credentials), None).await;
        self.metrics.pulled(pulled.as_ref().map_or_else(image::Error::word, |_| "done"), began.elapsed());
        Ok(Response::new(PullImageResponse { image_ref: pulled.map_err(|error| status(&error))?.id }))
    }

    async fn remove_image(&self, request: Request<RemoveImageRequest>) -> Answer<RemoveImageResponse> {
        let name = named(request.into_inner().image)?;
        audit::image(&name);
        if let Some(image) = self.images.removes(&name) {
            unused(self, &image)?;
        }
        self.images.remove(&name).map_err(|error| status(&error))?;
        Ok(Response::new(RemoveImageResponse {}))
    }

    async fn image_fs_info(&self, _: Request<ImageFsInfoRequest>) -> Answer<ImageFsInfoResponse> {
        let usage = self.images.fs_info().map_err(|error| status(&error))?;
        let images = FilesystemUsage {
            timestamp: usage.timestamp,
            fs_id: Some(FilesystemIdentifier { mountpoint: usage.mountpoint.display().to_string() }),
            used_bytes: Some(UInt64Value { value: usage.used_bytes }),
            inodes_used: Some(UInt64Value { value: usage.used_inodes }),
        };
        Ok(Response::new(ImageFsInfoResponse { image_filesystems: vec![images], container_filesystems: Vec::new() }))
    }

    type StreamImagesStream = Parts<StreamImagesResponse>;

    async fn stream_images(&self, request: Request<StreamImagesRequest>) -> Answer<Self::StreamImagesStream> {
        let images = listed(self, request.into_inner().filter)?;
        parts(&images, |images| StreamImagesResponse { images })
    }
}

fn listed(node: &Node, filter: Option<ImageFilter>) -> Result<Vec<Image>, Status> {
    let name = filter.and_then(|filter| filter.image).map(|image| image.image).filter(|name| !name.is_empty());
    let images = match name {
        Some(name) => node.images.resolve(&name).into_iter().collect(),
        None => node.images.list().map_err(|error| status(&error))?,
    };
    Ok(images.iter().map(wire_image).collect())
}

/// An image stays as long as a container is made of it or mounts it, also one that has exited: it may be asked for its image.
fn unused(node: &Node, image: &image::Image) -> Result<(), Status> {
    let containers = node.pods.containers();
    let Some(user) = containers.iter().find(|container| container.images().any(|id| id == image.id)) else {
        return Ok(());
    };
    let name = image.tags.first().unwrap_or(&image.id);
    let text = format!("image {name} is used by container {} ({}): remove that first", user.id, user.spec.name);
    Err(Error::FailedPrecondition(text).into())
}

fn named(image: Option<ImageSpec>) -> Result<String, Status> {
    let name = convert::required(image, "image")?.image;
    if name.is_empty() { Err(Status::invalid_argument("the image has no name")) } else { Ok(name) }
}

fn credentials(auth: AuthConfig) -> Auth {
    let AuthConfig { username, password, auth, server_address, identity_token, registry_token } = auth;
    Auth { username, password, auth, server_address, identity_token, registry_token }
}

fn wire_image(image: &image::Image) -> Image {
    let (uid, username) = convert::numeric_user(&image.config.user);
    Image {
        id: image.id.clone(),
        repo_tags: image.tags.clone(),
        repo_digests: image.digests.clone(),
        size: image.size,
        uid: uid.map(|value| Int64Value { value }),
        username,
        spec: Some(ImageSpec { image: image.id.clone(), ..ImageSpec::default() }),
        pinned: image.pinned,
    }
}

/// The image's configuration, in the form that crictl looks for.
fn info(image: &image::Image) -> HashMap<String, String> {
    let config = &image.config;
    let document = serde_json::json!({"imageSpec": {"config": {
        "User": config.user,
        "Env": config.env,
        "Entrypoint": config.entrypoint,
        "Cmd": config.cmd,
        "WorkingDir": config.cwd,
        "StopSignal": config.stop_signal,
        "Labels": config.labels,
        "Volumes": config.volumes,
    }}});
    HashMap::from([("info".to_owned(), document.to_string())])
}

/// The whole chain of an error in one line, under the code that says what a client can do about it.
fn status(error: &image::Error) -> Status {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    match reason(error) {
        // The kubelet looks for the word at the beginning of the text, and sees it there only if the code is Unknown: it puts all
        // others before the text (k8s.io/cri-client, PullImage).
        Some(word) => Status::new(Code::Unknown, format!("{word}: {text}")),
        None => Status::new(code(error), text),
    }
}

/// The words that the kubelet makes the reason of a container that waits for its image (k8s.io/cri-api, pkg/errors).
fn reason(error: &image::Error) -> Option<&'static str> {
    use image::errors::Registry;
    match error {
        image::Error::Signature(..) => Some("SignatureValidationFailed"),
        image::Error::Pull(
            _,
            Registry::Unreachable(..) | Registry::Stalled(..) | Registry::Broken(..) | Registry::Status(..),
        ) => Some("RegistryUnavailable"),
        image::Error::Shared(error) => reason(error),
        _ => None,
    }
}

fn code(error: &image::Error) -> Code {
    use image::errors::Registry;
    match error {
        image::Error::Reference(_) => Code::InvalidArgument,
        image::Error::Pull(_, Registry::NotFound { .. }) => Code::NotFound,
        image::Error::Pull(_, Registry::Denied { .. }) => Code::PermissionDenied,
        image::Error::Pull(_, Registry::Manifest(..)) => Code::FailedPrecondition,
        image::Error::Pull(_, Registry::RateLimited(_)) => Code::ResourceExhausted,
        image::Error::Pull(..) => Code::Unavailable,
        image::Error::Unpack(..) | image::Error::Import(_) => Code::FailedPrecondition,
        image::Error::Signature(..) | image::Error::Policy(_) => Code::FailedPrecondition,
        image::Error::DiskFull(..) => Code::ResourceExhausted,
        image::Error::Ending => Code::Aborted,
        image::Error::Shared(error) => code(error),
        image::Error::Io(..) => Code::Internal,
    }
}
